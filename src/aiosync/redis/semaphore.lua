-- The operations of one process on one semaphore. One call takes a batch of them.
--
-- KEYS  state    HASH: declared, limit, lease, run, gate, seq, touched, and epoch:<member>
--       members  ZSET: member -> end of its lease
--       holders  ZSET of "member:ticket:fence", all with score 0, so in lexical order
--       waiters  ZSET: "member:ticket" -> place; the smallest is served first
-- ARGV  limit, lease in ms, member, epoch, run, fresh in ms, "1" for an audit,
--       PUBLISH or SPUBLISH, then the operations
--
-- "epoch" numbers the connections of a member: a command of an older connection that arrives late
-- is refused. "run" identifies the server process. A change of it means that the state may be old
-- or incomplete. Its holders and waiters are deleted, and nothing is granted for one lease ("gate"),
-- while the processes claim the permits that they hold and wait again at the places that they had.
-- "fresh" is the rest of one lease since the server started: until then, a missing state may be the
-- result of the restart, so the gate is closed. "seq" numbers places and fences. When the state is
-- created or the run changes, it is raised to the clock of the server, so that fences grow even if
-- the state is lost.
--
-- Operations:
--   a ticket               take a permit, or wait for one
--   t ticket               take a permit if one is free
--   A ticket place         repeat a after a loss of the connection: the ticket may have been served
--   r ticket fence         give back; fence "-": stop waiting, or give back what was granted
--   c ticket fence         whether the permit is still held; while gated, take it again
--   N limit                change the limit
--   L                      the permits of this member
--   S                      statistics
--
-- Reply: {"ok", 1 if the member was not known, ms until another look is of use or -1, permits of
-- the member if audited else -1, number of waiters, {"ticket:fence" granted to this member},
-- {one answer for each operation}}, or {"differs", limit, lease}, or {"stale"}.

local state, members, holders, waiters = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local declared, lease, me = tonumber(ARGV[1]), tonumber(ARGV[2]), ARGV[3]
local epoch, run, fresh = tonumber(ARGV[4]), ARGV[5], tonumber(ARGV[6])
local audit, publish = ARGV[7] == '1', ARGV[8]

local ttl = time_to_live(lease)
local known = redis.call(
  'HMGET', state, 'declared', 'limit', 'lease', 'run', 'gate', 'seq', 'touched', 'epoch:' .. me
)
local limit, gate, seq, touched = tonumber(known[2]), tonumber(known[5]), tonumber(known[6]), known[7]
local changes = {}

local function set(field, value)
  changes[#changes + 1] = field
  changes[#changes + 1] = value
end

if not known[1] then
  -- No state: what is left of an earlier one must not count.
  redis.call('DEL', members, holders, waiters)
  limit, gate, seq, touched = declared, now + fresh, now_us, 0
  set('declared', declared)
  set('limit', limit)
  set('lease', lease)
  set('run', run)
  set('gate', text(gate))
else
  if tonumber(known[8] or 0) > epoch then
    return {'stale'}
  end
  if (declared ~= tonumber(known[1]) and declared ~= limit) or lease ~= tonumber(known[3]) then
    return {'differs', limit, tonumber(known[3])}
  end
  if run ~= known[4] then
    -- A permit in an old state may have passed to another process since. Its ticket, if it waits
    -- again, must not find it with `A`.
    redis.call('DEL', holders, waiters)
    gate, seq = now + lease, math.max(seq, now_us)
    set('run', run)
    set('gate', text(gate))
  end
end

local gated = now < gate
if not gated then
  -- Not while gated: the lease of a member that is about to reconnect may have ended.
  for _, dead in ipairs(remove_dead(members, state)) do
    for _, permit in ipairs(redis.call('ZRANGEBYLEX', holders, '[' .. dead .. ':', '(' .. dead .. ';')) do
      redis.call('ZREM', holders, permit)
    end
  end
end
-- Heartbeat: every command renews the lease.
local newly = redis.call('ZADD', members, text(now + lease), me)
if newly == 1 or tonumber(known[8] or 0) ~= epoch then -- it was removed with its member
  set('epoch:' .. me, epoch)
end

local held, waiting = redis.call('ZCARD', holders), redis.call('ZCARD', waiters)
local first_seq = seq
-- Whether a key was empty at any moment: a key that runs empty loses its time to live.
local holders_new, waiters_new = held == 0, waiting == 0

local function add_holder(member, ticket, fence)
  redis.call('ZADD', holders, 0, member .. ':' .. ticket .. ':' .. fence)
  held = held + 1
end

local function remove_holder(permit)
  held = held - redis.call('ZREM', holders, permit)
  holders_new = holders_new or held == 0
end

local function grant(member, ticket)
  seq = seq + 1
  local fence = text(seq)
  add_holder(member, ticket, fence)
  return fence
end

local function has_capacity()
  return not gated and waiting == 0 and held < limit
end

-- The permit that `ticket` of this member holds, or nil.
local function permit_of(ticket)
  local prefix = me .. ':' .. ticket
  return redis.call('ZRANGEBYLEX', holders, '[' .. prefix .. ':', '(' .. prefix .. ';', 'LIMIT', 0, 1)[1]
end

local function fence_of(permit)
  return string.match(permit, ':(%d+)$')
end

local function wait_for_permit(ticket, place)
  if not place then
    seq = seq + 1
    place = text(seq)
  end
  redis.call('ZADD', waiters, place, me .. ':' .. ticket)
  waiting = waiting + 1
  return 'w' .. place
end

-- Return whether the ticket of this member was waiting.
local function remove_waiter(ticket)
  local removed = redis.call('ZREM', waiters, me .. ':' .. ticket)
  waiting = waiting - removed
  waiters_new = waiters_new or waiting == 0
  return removed == 1
end

local operations = {}

function operations.a(ticket)
  return has_capacity() and 'g' .. grant(me, ticket) or wait_for_permit(ticket)
end

function operations.t(ticket)
  return has_capacity() and 'g' .. grant(me, ticket) or '-'
end

function operations.A(ticket, place)
  local permit = permit_of(ticket)
  if permit then
    return 'g' .. fence_of(permit)
  end
  local known_place = redis.call('ZSCORE', waiters, me .. ':' .. ticket)
  if known_place then
    return 'w' .. text(tonumber(known_place))
  end
  if place ~= '0' then
    return wait_for_permit(ticket, place) -- where it was before the state was lost
  end
  return operations.a(ticket)
end

function operations.r(ticket, fence)
  if fence ~= '-' then
    remove_holder(me .. ':' .. ticket .. ':' .. fence)
  elseif not remove_waiter(ticket) then
    local permit = permit_of(ticket)
    if permit then
      remove_holder(permit)
    end
  end
  return '-'
end

function operations.c(ticket, fence)
  if redis.call('ZSCORE', holders, me .. ':' .. ticket .. ':' .. fence) then
    return '1'
  end
  if gated then
    -- The limit may be smaller than when the permit was granted.
    add_holder(me, ticket, fence)
    return '1'
  end
  return '0'
end

function operations.N(value)
  limit = tonumber(value)
  set('limit', limit)
  return '-'
end

function operations.L()
  local permits = {}
  for _, permit in ipairs(redis.call('ZRANGEBYLEX', holders, '[' .. me .. ':', '(' .. me .. ';')) do
    permits[#permits + 1] = string.sub(permit, #me + 2)
  end
  return table.concat(permits, ' ')
end

function operations.S()
  local members_now = redis.call('ZCARD', members)
  return table.concat({limit, held, waiting, members_now, gated and 1 or 0}, ' ')
end

local ARGUMENTS = {a = 1, t = 1, A = 2, r = 2, c = 2, N = 1, L = 0, S = 0}
local answers = {}
local i = 9
while ARGV[i] do
  local kind = ARGV[i]
  answers[#answers + 1] = operations[kind](ARGV[i + 1], ARGV[i + 2])
  i = i + 1 + ARGUMENTS[kind]
end

-- Serve the waiters in order. A waiter of a dead member is skipped.
local grants, messages, recipients = {}, {}, {}
while not gated and waiting > 0 and held < limit do
  local waiter = redis.call('ZPOPMIN', waiters)[1]
  waiting = waiting - 1
  local member, ticket = string.match(waiter, '^([^:]+):(%d+)$')
  if member == me then
    grants[#grants + 1] = ticket .. ':' .. grant(me, ticket)
  else
    local lease_end = redis.call('ZSCORE', members, member)
    if lease_end and tonumber(lease_end) > now then
      if not messages[member] then
        messages[member] = {}
        recipients[#recipients + 1] = member
      end
      table.insert(messages[member], ticket .. ':' .. grant(member, ticket))
    end
  end
  waiters_new = waiters_new or waiting == 0
end
-- One message to each process that was granted something.
for _, member in ipairs(recipients) do
  redis.call(publish, state .. '!' .. member, table.concat(messages[member], ' '))
end

if seq ~= first_seq or not known[1] or run ~= known[4] then
  set('seq', text(seq))
end
if now - tonumber(touched) > ttl / 3 then
  set('touched', text(now))
end
if #changes > 0 then
  redis.call('HSET', state, unpack(changes))
end
if now - tonumber(touched) > ttl / 3 then
  for _, key in ipairs(KEYS) do
    redis.call('PEXPIRE', key, ttl)
  end
else
  if newly == 1 then
    redis.call('PEXPIRE', members, ttl)
  end
  if holders_new and held > 0 then
    redis.call('PEXPIRE', holders, ttl)
  end
  if waiters_new and waiting > 0 then
    redis.call('PEXPIRE', waiters, ttl)
  end
end

local look = -1
if gated then
  look = gate - now + 1
elseif waiting > 0 then
  look = next_expiry(members)
end
local mine = audit and redis.call('ZLEXCOUNT', holders, '[' .. me .. ':', '(' .. me .. ';') or -1
return {'ok', newly, look, mine, waiting, grants, answers}
