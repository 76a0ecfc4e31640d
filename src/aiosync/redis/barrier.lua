-- The operations of one process on one barrier. One call takes a batch of them.
--
-- KEYS  state     HASH: parties, lease, run, round, since, gap, resumed, status, why, arrived,
--                 actor, last_round, touched, epoch:<member>, and plain:<member>, the number
--                 of the last z or n
--       members   ZSET: member -> end of its lease
--       arrivals  HASH: "member:ticket" -> index, of the current round
--       last      HASH: the arrivals of the last round that has tripped
--       broken    HASH: round -> "why:arrived", of the last 1,000 rounds that were broken
-- ARGV  parties, lease in ms, member, epoch, run, PUBLISH or SPUBLISH, then the operations
--
-- "round" numbers the rounds. It begins at the clock of the server, so that a round of a state
-- that was lost ("since": the first round of this one) is never mistaken for a later one. For the
-- same reason it goes on at the clock ("resumed") if the run is another one, since the state may be
-- an old one then: nothing is known of the rounds from "gap" up to it. "status" is filling,
-- acting (all have arrived, and the last party, "actor", runs the action) or broken.
-- "epoch" and "run": see semaphore.lua.
--
-- Operations:
--   a ticket action             arrive; action: 1 if the last party has to run it
--   A ticket round action       repeat a after a loss of the connection; round: the last one known
--   q ticket round              ask for the outcome of the round
--   l ticket round why          leave, which breaks the round unless all have arrived
--   d ticket round              the action is done
--   f ticket round              the action has failed
--   z number                    abort, unless number is not new
--   n number                    reset, unless number is not new
--   S                           statistics
-- Answers: "w round index" wait, "y round index" run the action, "t round index" the round has
-- tripped, "b round why arrived" it was broken, "l" arrive again when the round is over, "?" the
-- party had arrived, and its outcome is not known any more.
--
-- Reply: {"ok", 1 if the member was not known, ms until another look is of use or -1, round,
-- number of arrivals, status, {events}, {answers}}, or {"differs", parties, lease}, or {"stale"}.
-- Events, which are published too: "t:round", "b:round:why:arrived", "n:round" (reset; the next
-- round).

local state, members, arrivals, last, broken = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5]
local parties, lease, me = tonumber(ARGV[1]), tonumber(ARGV[2]), ARGV[3]
local epoch, run, publish = tonumber(ARGV[4]), ARGV[5], ARGV[6]
local KEPT = 1000

local ttl = time_to_live(lease)
local known = redis.call(
  'HMGET', state, 'parties', 'lease', 'run', 'round', 'since', 'status', 'why', 'arrived', 'actor',
  'last_round', 'touched', 'epoch:' .. me, 'plain:' .. me, 'gap', 'resumed'
)
local round, since = tonumber(known[4]), tonumber(known[5])
local status, why, arrived_then, actor = known[6], known[7] or '', known[8] or '0', known[9] or ''
local last_round = tonumber(known[10] or 0)
local touched = tonumber(known[11] or 0)
local plain = tonumber(known[13] or 0)
local gap, resumed = tonumber(known[14] or 0), tonumber(known[15] or 0)
local events = {}

if not known[1] then
  -- No state: what is left of an earlier one must not count.
  redis.call('DEL', members, arrivals, last, broken)
  round, since, status = now_us, now_us, 'filling'
else
  if tonumber(known[12] or 0) > epoch then
    return {'stale'}
  end
  if parties ~= tonumber(known[1]) or lease ~= tonumber(known[2]) then
    return {'differs', tonumber(known[1]), tonumber(known[2])}
  end
end

-- Whether a key was empty, so that it has no time to live yet.
local arrivals_new, last_new, broken_new = redis.call('HLEN', arrivals) == 0, false, false

local function next_round()
  round = round + 1
  redis.call('HDEL', broken, text(round - KEPT))
end

local function break_round(reason)
  local arrived = redis.call('HLEN', arrivals)
  broken_new = true
  redis.call('HSET', broken, text(round), reason .. ':' .. arrived)
  redis.call('DEL', arrivals)
  arrivals_new = true
  events[#events + 1] = 'b:' .. text(round) .. ':' .. reason .. ':' .. arrived
  status, why, arrived_then, actor = 'broken', reason, tostring(arrived), ''
  next_round()
end

local function trip()
  redis.call('RENAME', arrivals, last)
  arrivals_new, last_new = true, true
  events[#events + 1] = 't:' .. text(round)
  last_round, status, actor = round, 'filling', ''
  next_round()
end

if known[1] and run ~= known[3] then
  if redis.call('HLEN', arrivals) > 0 then
    break_round('lost') -- these arrivals may be old, and others may be missing
  end
  gap = round
  round = math.max(round, now_us)
  resumed = round
end
for _, dead in ipairs(remove_dead(members, state)) do
  for _, arrival in ipairs(redis.call('HKEYS', arrivals)) do
    if string.sub(arrival, 1, #dead + 1) == dead .. ':' then
      break_round('lost')
      break
    end
  end
end
-- Heartbeat: every command renews the lease.
local newly = redis.call('ZADD', members, text(now + lease), me)

local function answer(kind, index)
  return kind .. ' ' .. text(round) .. ' ' .. index
end

local function broken_answer()
  return 'b ' .. text(round) .. ' ' .. why .. ' ' .. arrived_then
end

-- The answer to a party that has arrived in the current round.
local function arrived_answer(party, index)
  return answer(status == 'acting' and actor == party and 'y' or 'w', index)
end

-- The answer to `party`, which arrived in round number `asked`.
local function outcome_of(party, asked)
  if asked == round then
    local index = redis.call('HGET', arrivals, party)
    if index then
      return arrived_answer(party, index)
    end
    if status ~= 'broken' then
      break_round('lost') -- the server has forgotten the arrival
    end
    return broken_answer()
  end
  if asked < since or asked > round or (asked >= gap and asked < resumed) then
    if status ~= 'broken' and asked > round then
      break_round('lost') -- an older state has come back
    end
    return 'b ' .. text(asked) .. ' lost 0'
  end
  local reason = redis.call('HGET', broken, text(asked))
  if reason then
    return 'b ' .. text(asked) .. ' ' .. string.gsub(reason, ':', ' ')
  end
  return 't ' .. text(asked) .. ' -1'
end

local operations = {}

function operations.a(ticket, action)
  local party = me .. ':' .. ticket
  if status == 'broken' then
    return broken_answer()
  end
  if status == 'acting' then
    return 'l'
  end
  local index = redis.call('HLEN', arrivals)
  redis.call('HSET', arrivals, party, index)
  if index + 1 < parties then
    return answer('w', index)
  end
  if action == '1' then
    status, actor = 'acting', party
    return answer('y', index)
  end
  local tripped = answer('t', index)
  trip()
  return tripped
end

function operations.A(ticket, asked, action)
  local party, before = me .. ':' .. ticket, tonumber(asked)
  local index = redis.call('HGET', arrivals, party)
  if index then
    return arrived_answer(party, index)
  end
  index = redis.call('HGET', last, party)
  if index then
    return 't ' .. text(last_round) .. ' ' .. index
  end
  -- If it has passed, that was in a round before the last one that has tripped.
  local has_not_passed = status == 'broken' and before >= last_round
  if before == round or has_not_passed or (before == 0 and newly == 1) then
    return operations.a(ticket, action)
  end
  return '?'
end

function operations.q(ticket, asked)
  return outcome_of(me .. ':' .. ticket, tonumber(asked))
end

function operations.l(ticket, asked, reason)
  local party = me .. ':' .. ticket
  local index = redis.call('HGET', arrivals, party)
  if index and status == 'filling' then
    local left = round
    break_round(reason)
    return outcome_of(party, left)
  end
  if index then
    return arrived_answer(party, index)
  end
  index = redis.call('HGET', last, party)
  if index then
    return 't ' .. text(last_round) .. ' ' .. index
  end
  return asked == '0' and '-' or outcome_of(party, tonumber(asked))
end

function operations.d(ticket, asked)
  local party = me .. ':' .. ticket
  if status == 'acting' and actor == party then
    trip()
  end
  return outcome_of(party, tonumber(asked))
end

function operations.f(ticket, asked)
  local party = me .. ':' .. ticket
  if status == 'acting' and actor == party then
    break_round('action')
  end
  return outcome_of(party, tonumber(asked))
end

-- Whether an abort or a reset is new, and not repeated because its reply was lost.
local function is_new(number)
  if tonumber(number) <= plain then
    return false
  end
  plain = tonumber(number)
  return true
end

function operations.z(number)
  if is_new(number) and status ~= 'broken' then
    break_round('aborted')
  end
  return '-'
end

function operations.n(number)
  if not is_new(number) then
    return '-'
  end
  if status ~= 'broken' and redis.call('HLEN', arrivals) > 0 then
    break_round('reset')
  end
  if status == 'broken' then
    status, why = 'filling', ''
    events[#events + 1] = 'n:' .. text(round)
  end
  return '-'
end

function operations.S()
  local waiting = redis.call('HLEN', arrivals)
  return table.concat({parties, waiting, status, redis.call('ZCARD', members)}, ' ')
end

local ARGUMENTS = {a = 2, A = 3, q = 2, l = 3, d = 2, f = 2, z = 1, n = 1, S = 0}
local answers = {}
local i = 7
while ARGV[i] do
  local kind = ARGV[i]
  answers[#answers + 1] = operations[kind](ARGV[i + 1], ARGV[i + 2], ARGV[i + 3])
  i = i + 1 + ARGUMENTS[kind]
end

-- One message to all processes.
if #events > 0 then
  redis.call(publish, state .. '!', table.concat(events, ' '))
end

local renew = now - touched > ttl / 3
redis.call(
  'HSET', state, 'parties', parties, 'lease', lease, 'run', run, 'round', text(round),
  'since', text(since), 'gap', text(gap), 'resumed', text(resumed), 'status', status,
  'why', why, 'arrived', arrived_then, 'actor', actor,
  'last_round', text(last_round), 'touched', text(renew and now or touched),
  'epoch:' .. me, epoch, 'plain:' .. me, plain
)
local arrived = redis.call('HLEN', arrivals)
if renew then
  for _, key in ipairs(KEYS) do
    redis.call('PEXPIRE', key, ttl)
  end
else
  if newly == 1 then
    redis.call('PEXPIRE', members, ttl)
  end
  if arrivals_new and arrived > 0 then
    redis.call('PEXPIRE', arrivals, ttl)
  end
  if last_new then
    redis.call('PEXPIRE', last, ttl)
  end
  if broken_new then
    redis.call('PEXPIRE', broken, ttl)
  end
end
return {'ok', newly, arrived > 0 and next_expiry(members) or -1, text(round), arrived, status, events, answers}
