"""The Lua scripts of sessions: each is one atomic step that may be sent twice.

A reply may be lost after a script ran, so every script recognises its own second run and answers as
it did the first time. A script checks everything before it writes anything, because Redis does not
roll back. A full server refuses a script as a whole, unless its first line says otherwise.

Every script takes the seven keys of a session (`redis_keys.SessionKeys`) and answers a list whose
first item is a word: OK, or what is wrong (MISSING, EXISTS, BUSY, FENCED, CONFLICT, QUOTA).

Words: *fenced*, the lease is another's; *conflict*, the lease is ours but the history is not what
we read, which only a failover with a lost tail can bring about.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Script:
    """A script and the digest by which a server that has it runs it."""

    name: str
    source: str = field(repr=False)

    @property
    def sha(self) -> str:
        """Hex SHA-1 of the source."""
        return hashlib.sha1(self.source.encode(), usedforsecurity=False).hexdigest()


_PRELUDE = """
local call = redis.call
local M, TOK, LOG, OPEN, IDS, LEASE, INDEX = unpack(KEYS, 1, 7)

local function now_ms()
  local t = call('TIME')
  return t[1] * 1000 + math.floor(t[2] / 1000)
end

-- The session was used: all its keys get the whole TTL again, the index at least that.
local function touch(now)
  local ttl = tonumber(call('HGET', M, 'ttl_ms'))
  call('HSET', M, 'updated_ms', now)
  for i = 1, 5 do call('PEXPIRE', KEYS[i], ttl) end
  if call('PTTL', INDEX) < ttl then call('PEXPIRE', INDEX, ttl) end
end

-- nil when the session is held under this token and epoch, and then the lease is whole again;
-- otherwise the answer. A lease that ran out is still ours while nobody else took the session.
local function not_ours(token, epoch, lease_ms)
  local v = call('HMGET', M, 'epoch', 'holder')
  if not v[1] then return {'MISSING'} end
  local held = call('GET', LEASE)
  if (held or v[2]) ~= token then return {'FENCED', 'held by ' .. (held or v[2] or 'nobody')} end
  if v[1] ~= epoch then return {'FENCED', 'epoch ' .. v[1] .. ', ours is ' .. epoch} end
  call('SET', LEASE, token, 'PX', lease_ms)
  return nil
end

local function history_differs(turn, ntok)
  local v = call('HMGET', M, 'turn', 'ntok')
  if v[1] ~= turn or v[2] ~= ntok or call('STRLEN', TOK) ~= 4 * ntok then
    return {'CONFLICT', 'turn ' .. v[1] .. ' with ' .. v[2] .. ' tokens, ours is turn ' .. turn ..
      ' with ' .. ntok}
  end
  return nil
end

-- What of `ids`, the open turn's from token `from` on, is not there yet; nil and the answer when
-- it cannot follow.
local function rest_of(req, from, ids)
  if call('HGET', OPEN, 'req') ~= req then return nil, {'CONFLICT', 'the turn is not open'} end
  local start, have = 4 * from, call('STRLEN', IDS)
  if have < start then
    return nil, {'CONFLICT', 'the open turn has ' .. (have / 4) .. ' tokens, not ' .. from}
  end
  local known = math.min(have - start, #ids)
  if known > 0 and call('GETRANGE', IDS, start, start + known - 1) ~= string.sub(ids, 1, known) then
    return nil, {'CONFLICT', 'the open turn has other tokens'}
  end
  local quota, total = tonumber(call('HGET', M, 'quota')), 0
  total = call('HGET', M, 'ntok') + (have + #ids - known) / 4
  if quota > 0 and total > quota then return nil, {'QUOTA', total, quota} end
  return string.sub(ids, known + 1)
end
"""


_ALLOW_OOM = "allow-oom"
"""A full server runs it: what frees memory, and what lets a turn that runs come to its end."""
_NO_WRITES = "no-writes"


def _script(name: str, body: str, flags: str = "") -> Script:
    return Script(name, f"#!lua{' flags=' * bool(flags)}{flags}\n{_PRELUDE}{body}")


CREATE = _script(
    "create",
    """
-- A nonce ttl_ms quota ns metadata session_id
if call('EXISTS', M) == 1 then
  return {call('HGET', M, 'nonce') == ARGV[1] and 'OK' or 'EXISTS'}
end
local now = now_ms()
call('DEL', TOK, LOG, OPEN, IDS, LEASE)
call('HSET', M, 'nonce', ARGV[1], 'ttl_ms', ARGV[2], 'quota', ARGV[3], 'ns', ARGV[4],
  'metadata', ARGV[5], 'epoch', 0, 'turn', 0, 'ntok', 0, 'created_ms', now)
call('ZADD', INDEX, 0, ARGV[6])
touch(now)
return {'OK'}
""",
)

FORK = _script(
    "fork",
    """
-- K 8.. the new session's, as 1..6; A nonce ttl_ms quota ns metadata session_id source_nonce ntok
-- turn num_snapshots, then field and value of each snapshot, then turn, request and record of each
local M2, TOK2, LOG2 = KEYS[8], KEYS[9], KEYS[10]
if call('EXISTS', M2) == 1 then
  return {call('HGET', M2, 'nonce') == ARGV[1] and 'OK' or 'EXISTS'}
end
local v = call('HMGET', M, 'nonce', 'ntok')
if v[1] ~= ARGV[7] or tonumber(v[2]) < tonumber(ARGV[8]) then return {'MISSING'} end
local now = now_ms()
call('DEL', unpack(KEYS, 9, 13))
call('HSET', M2, 'nonce', ARGV[1], 'ttl_ms', ARGV[2], 'quota', ARGV[3], 'ns', ARGV[4],
  'metadata', ARGV[5], 'epoch', 0, 'turn', ARGV[9], 'ntok', ARGV[8], 'created_ms', now)
if tonumber(ARGV[8]) > 0 then call('SET', TOK2, call('GETRANGE', TOK, 0, 4 * ARGV[8] - 1)) end
local i = 11
for _ = 1, tonumber(ARGV[10]) do
  call('HSET', M2, ARGV[i], ARGV[i + 1])
  i = i + 2
end
while ARGV[i] do
  call('XADD', LOG2, ARGV[i] .. '-0', 'req', ARGV[i + 1], 'd', ARGV[i + 2])
  i = i + 3
end
call('ZADD', INDEX, 0, ARGV[6])
for i = 1, 5 do KEYS[i] = KEYS[i + 7] end
M = M2
touch(now)
return {'OK'}
""",
)

DELETE = _script(
    "delete",
    """
-- A session_id
call('ZREM', INDEX, ARGV[1])
local there = call('EXISTS', M)
call('UNLINK', M, TOK, LOG, OPEN, IDS, LEASE)
return {'OK', there}
""",
    _ALLOW_OOM,
)

PRUNE = _script(
    "prune",
    """
-- A session_id; takes an expired session out of the index
if call('EXISTS', M) == 0 then call('ZREM', INDEX, ARGV[1]) end
return {'OK'}
""",
    _ALLOW_OOM,
)

ACQUIRE = _script(
    "acquire",
    """
-- A token lease_ms lost dead_prefix; `lost` is a lease of our process that nobody in it knows
local v = call('HMGET', M, 'epoch', 'turn', 'ntok', 'quota', 'ns')
if not v[1] then return {'MISSING'} end
local held = call('GET', LEASE)
if held ~= ARGV[1] then
  if held and held ~= ARGV[3] then
    local process = string.match(held, '^(.*)#[^#]*$')
    if not process or call('EXISTS', ARGV[4] .. process) == 0 then
      return {'BUSY', held, call('PTTL', LEASE)}
    end
  end
  v[1] = call('HINCRBY', M, 'epoch', 1)
  call('HSET', M, 'holder', ARGV[1])
end
call('SET', LEASE, ARGV[1], 'PX', ARGV[2])
touch(now_ms())
return {'OK', tonumber(v[1]), tonumber(v[2]), tonumber(v[3]), tonumber(v[4]), v[5]}
""",
    _ALLOW_OOM,
)

RENEW = _script(
    "renew",
    """
-- A token epoch lease_ms
local wrong = not_ours(ARGV[1], ARGV[2], ARGV[3])
if wrong then return wrong end
touch(now_ms())
return {'OK'}
""",
    _ALLOW_OOM,
)

RELEASE = _script(
    "release",
    """
-- A token
if call('GET', LEASE) == ARGV[1] then call('DEL', LEASE) end
if call('HGET', M, 'holder') == ARGV[1] then call('HDEL', M, 'holder') end
return {'OK'}
""",
    _ALLOW_OOM,
)

OPEN = _script(
    "open",
    """
-- A token epoch lease_ms turn ntok request_id prompt_ids seed request
local wrong = not_ours(ARGV[1], ARGV[2], ARGV[3]) or history_differs(ARGV[4], ARGV[5])
if wrong then return wrong end
if call('HGET', OPEN, 'req') == ARGV[6] then return {'OK', call('STRLEN', IDS) / 4} end
local quota, total = tonumber(call('HGET', M, 'quota')), ARGV[5] + #ARGV[7] / 4
if quota > 0 and total >= quota then return {'QUOTA', total + 1, quota} end
local now = now_ms()
call('DEL', OPEN)
call('HSET', OPEN, 'req', ARGV[6], 'prompt', #ARGV[7] / 4, 'seed', ARGV[8], 'request', ARGV[9],
  'started_ms', now)
call('SET', IDS, ARGV[7])
touch(now)
return {'OK', #ARGV[7] / 4}
""",
)

CHECKPOINT = _script(
    "checkpoint",
    """
-- A token epoch lease_ms turn ntok request_id from ids
local wrong = not_ours(ARGV[1], ARGV[2], ARGV[3]) or history_differs(ARGV[4], ARGV[5])
if wrong then return wrong end
local rest, bad = rest_of(ARGV[6], ARGV[7], ARGV[8])
if not rest then return bad end
if #rest > 0 then call('APPEND', IDS, rest) end
touch(now_ms())
return {'OK', call('STRLEN', IDS) / 4}
""",
    _ALLOW_OOM,
)

COMMIT = _script(
    "commit",
    """
-- A token epoch lease_ms turn ntok request_id from ids record
local turn = ARGV[4] + 1
local done = call('XRANGE', LOG, turn .. '-0', turn .. '-0')
if done[1] and done[1][2][2] == ARGV[6] then
  touch(now_ms())
  local v = call('HMGET', M, 'turn', 'ntok')
  return {'OK', tonumber(v[1]), tonumber(v[2])}
end
local wrong = not_ours(ARGV[1], ARGV[2], ARGV[3]) or history_differs(ARGV[4], ARGV[5])
if wrong then return wrong end
local rest, bad = rest_of(ARGV[6], ARGV[7], ARGV[8])
if not rest then return bad end
if #rest > 0 then call('APPEND', IDS, rest) end
if call('STRLEN', IDS) > 0 then
  if ARGV[5] == '0' then call('RENAME', IDS, TOK) else call('APPEND', TOK, call('GET', IDS)) end
end
call('DEL', OPEN, IDS)
local ntok = call('STRLEN', TOK) / 4
call('XADD', LOG, turn .. '-0', 'req', ARGV[6], 'd', ARGV[9])
call('HSET', M, 'turn', turn, 'ntok', ntok)
touch(now_ms())
return {'OK', turn, ntok}
""",
    _ALLOW_OOM,
)

ABANDON = _script(
    "abandon",
    """
-- A token epoch lease_ms
local wrong = not_ours(ARGV[1], ARGV[2], ARGV[3])
if wrong then return wrong end
call('DEL', OPEN, IDS)
local ntok = tonumber(call('HGET', M, 'ntok'))
for _, name in ipairs(call('HKEYS', M)) do
  local at = string.match(name, '^snap:(%d+)$')
  if at and tonumber(at) > ntok then call('HDEL', M, name) end
end
touch(now_ms())
return {'OK'}
""",
    _ALLOW_OOM,
)

ATTACH = _script(
    "attach",
    """
-- A num_tokens hash limit
local ntok = call('HGET', M, 'ntok')
if not ntok then return {'MISSING'} end
if tonumber(ARGV[1]) > ntok + call('STRLEN', IDS) / 4 then return {'CONFLICT', 'not there yet'} end
call('HSET', M, 'snap:' .. ARGV[1], ARGV[2])
local at = {}
for _, name in ipairs(call('HKEYS', M)) do
  local n = string.match(name, '^snap:(%d+)$')
  if n then at[#at + 1] = tonumber(n) end
end
table.sort(at)
for i = 1, #at - ARGV[3] do call('HDEL', M, string.format('snap:%d', at[i])) end
return {'OK'}
""",
)

READ = _script(
    "read",
    """
return {'OK', call('HGETALL', M), call('GET', LEASE), call('HGET', OPEN, 'req'),
  call('HGET', OPEN, 'prompt'), call('STRLEN', IDS)}
""",
    _NO_WRITES,
)

READ_OPEN = _script(
    "read_open",
    """
return {'OK', call('HMGET', OPEN, 'req', 'prompt', 'seed', 'request', 'started_ms'),
  call('STRLEN', IDS)}
""",
    _NO_WRITES,
)

READ_IDS = _script(
    "read_ids",
    """
-- A key_number first last; of bytes, the last one included
return {'OK', call('STRLEN', KEYS[tonumber(ARGV[1])]),
  call('GETRANGE', KEYS[tonumber(ARGV[1])], ARGV[2], ARGV[3])}
""",
    _NO_WRITES,
)

ALL = (
    CREATE,
    FORK,
    DELETE,
    PRUNE,
    ACQUIRE,
    RENEW,
    RELEASE,
    OPEN,
    CHECKPOINT,
    COMMIT,
    ABANDON,
    ATTACH,
    READ,
    READ_OPEN,
    READ_IDS,
)
