"""The Lua scripts of batches; the rules of `router.state.scripts` hold here too.

Every script takes the keys of a batch (`redis_keys.BatchKeys`) and answers a list whose first item
is a word: OK, or MISSING, SAME, BUSY, DONE, FENCED.
"""

from __future__ import annotations

from router.state.scripts import Script

_PRELUDE = """
local call = redis.call
local B, INDEX, WAITING, KNOWN = unpack(KEYS, 1, 4)

local function now_ms()
  local t = call('TIME')
  return t[1] * 1000 + math.floor(t[2] / 1000)
end

local function has_ended(state)
  return state == 'completed' or state == 'failed' or state == 'cancelled'
end

-- Everything that is written gives the batch its whole TTL again, the index at least that.
local function touch(now)
  local ttl = tonumber(call('HGET', B, 'ttl_ms'))
  call('HSET', B, 'updated_ms', now)
  call('PEXPIRE', B, ttl)
  if call('PTTL', INDEX) < ttl then call('PEXPIRE', INDEX, ttl) end
end

local function enter(state, now, member)
  call('HSET', B, 'state', state)
  if has_ended(state) then
    call('HSET', B, 'ended_ms', now)
    call('HDEL', B, 'holder', 'until_ms')
    call('ZREM', WAITING, member)
  end
end

-- nil when the batch is held under this token and epoch, and then the lease is whole again.
local function not_ours(token, epoch, lease_ms, now)
  local v = call('HMGET', B, 'state', 'holder', 'epoch')
  if not v[1] then return {'MISSING'} end
  if v[2] ~= token or v[3] ~= epoch then
    return {'FENCED', v[2] and ('held by ' .. v[2] .. ' in epoch ' .. v[3]) or v[1]}
  end
  call('HSET', B, 'until_ms', now + lease_ms)
  return nil
end
"""

_ALLOW_OOM = "allow-oom"


def _script(name: str, body: str, flags: str = "") -> Script:
    return Script(name, f"#!lua{' flags=' * bool(flags)}{flags}\n{_PRELUDE}{body}")


CREATE = _script(
    "batch_create",
    """
-- A name member version ttl_ms known_ms, then fields and values; known_ms 0: no idempotency key
if ARGV[5] ~= '0' then
  local known = call('GET', KNOWN)
  if known and known ~= ARGV[1] then return {'SAME', known} end
  call('SET', KNOWN, ARGV[1], 'PX', ARGV[5])
end
if call('EXISTS', B) == 1 then return {'OK'} end
local now = now_ms()
call('HSET', B, 'v', ARGV[3], 'ttl_ms', ARGV[4], 'epoch', 0, 'state', 'validating',
  'created_ms', now, unpack(ARGV, 6))
call('ZADD', INDEX, 0, ARGV[1])
call('ZADD', WAITING, now, ARGV[2])
touch(now)
return {'OK'}
""",
)

ACQUIRE = _script(
    "batch_acquire",
    """
-- A member token lease_ms
local v = call('HMGET', B, 'state', 'holder', 'until_ms')
if not v[1] or has_ended(v[1]) then
  call('ZREM', WAITING, ARGV[1])
  return {v[1] and 'DONE' or 'MISSING'}
end
local now = now_ms()
if v[2] and v[2] ~= ARGV[2] and tonumber(v[3]) > now then
  return {'BUSY', v[2], v[3] - now}
end
if v[2] ~= ARGV[2] then call('HINCRBY', B, 'epoch', 1) end
call('HSET', B, 'holder', ARGV[2], 'until_ms', now + ARGV[3])
touch(now)
return {'OK', tonumber(call('HGET', B, 'epoch'))}
""",
    _ALLOW_OOM,
)

UPDATE = _script(
    "batch_update",
    """
-- A member token epoch lease_ms state, then fields and values; empty state: as it is
local now = now_ms()
local wrong = not_ours(ARGV[2], ARGV[3], ARGV[4], now)
if wrong then return wrong end
if #ARGV > 5 then call('HSET', B, unpack(ARGV, 6)) end
local state = ARGV[5]
if state ~= '' and (has_ended(state) or call('HGET', B, 'state') ~= 'cancelling') then
  enter(state, now, ARGV[1])
end
touch(now)
return {'OK', call('HGET', B, 'state')}
""",
    _ALLOW_OOM,
)

RELEASE = _script(
    "batch_release",
    """
-- A token
if call('HGET', B, 'holder') == ARGV[1] then call('HDEL', B, 'holder', 'until_ms') end
return {'OK'}
""",
    _ALLOW_OOM,
)

CANCEL = _script(
    "batch_cancel",
    """
-- A member; ends a batch that nobody drives at once, and asks who drives it to end it otherwise
local v = call('HMGET', B, 'state', 'holder', 'until_ms')
if not v[1] then return {'MISSING'} end
if has_ended(v[1]) then return {'OK', v[1]} end
local now = now_ms()
local is_held = v[2] and tonumber(v[3]) > now
enter(is_held and 'cancelling' or 'cancelled', now, ARGV[1])
touch(now)
return {'OK', call('HGET', B, 'state')}
""",
    _ALLOW_OOM,
)

ALL = (CREATE, ACQUIRE, UPDATE, RELEASE, CANCEL)
