-- The beginning of both scripts: the clock, and the members with their leases.
--
-- A member is one process that has entered `Redis`. Its lease is its score in the ZSET `members`:
-- the time of the server, in milliseconds, at which the member counts as dead.

local now_us                    -- the time of the server, in microseconds
local now                       -- the same in milliseconds
do
  local time = redis.call('TIME')
  now_us = time[1] * 1000000 + time[2]
  now = math.floor(now_us / 1000)
end

-- Lua prints large numbers in exponential notation otherwise.
local function text(number)
  return string.format('%.0f', number)
end

-- Milliseconds after which the keys of an unused name expire. They are renewed only when a third of
-- this has passed, so that not every command writes to every key.
local function time_to_live(lease)
  return math.max(10 * lease, 60000)
end

-- Remove the members whose lease has run out, and return their names. At most 16 at a time, so
-- that no script runs for long; the others are found by the next command.
local function remove_dead(members, state)
  local dead = redis.call('ZRANGEBYSCORE', members, '-inf', now, 'LIMIT', 0, 16)
  for _, member in ipairs(dead) do
    redis.call('ZREM', members, member)
    redis.call('HDEL', state, 'epoch:' .. member, 'plain:' .. member)
  end
  return dead
end

-- Milliseconds until the first lease runs out.
local function next_expiry(members)
  local first = redis.call('ZRANGE', members, 0, 0, 'WITHSCORES')
  return first[2] and math.max(1, tonumber(first[2]) - now + 1) or -1
end
