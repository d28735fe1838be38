// Paged causal attention from the input projection to the output gate.
//
// Layout of the cache: kv_cache.h.
//
// Keys are visited from position 0 in chunks of `kChunk` groups with an online softmax. A query sees
// the same chunks in the same order whoever shares its tile, batch or prefill chunk, and skips chunks
// behind its own position, so its bits depend on its own sequence alone.
//
// A past that does not fit the cache comes in sections, the oldest first: the running softmax of
// every query (sums, maximum, unscaled output) rests in memory between them. A section is a multiple
// of kKeys keys, so the chunks are the same ones, and so are the bits.
#include <limits>
#include <utility>
#include <vector>

#include "entry.h"
#include "kv_cache.h"
#include "pool.h"

namespace em {
namespace {

constexpr int kChunk = 4;  // groups between two looks at the running maximum
constexpr int kKeys = kGroup * kChunk;
// Rows of a task that share each read of the keys: a few of them wait for memory in a long context,
// many leave threads idle in a short chunk.
constexpr int64_t kTaskRows = 128, kLeastTaskTokens = 16;
#if defined(__AVX512BF16__)
constexpr int kRows = 6, kScoreGroups = 4, kValueVectors = 4;
#else
constexpr int kRows = 2, kScoreGroups = 2, kValueVectors = 4;
#endif

struct Layer {
  int64_t heads, kv_heads, hd, rotary;
  float scale, eps;
  const float* q_norm;
  const float* k_norm;
};

struct Batch {
  const int32_t *query_start, *context_lens, *block_tables;
  int64_t sequences, max_blocks;
  int64_t length(int64_t s) const { return query_start[s + 1] - query_start[s]; }
};

// out = rotary(x / rms(x) * (1 + weight)).
void norm_and_rotate(const float* x, const float* weight, const Layer& p, const float* cos_sin,
                     float* out) {
  Vf squares = zero();
  for_vectors(p.hd, [&](int64_t i, int n) {
    Vf a = load_up_to(x + i, n);
    squares = fma(a, a, squares);
  });
  Vf scale = set1(1.0f / std::sqrt(sum(squares) / float(p.hd) + p.eps));
  for_vectors(p.hd, [&](int64_t i, int n) {
    Vf w = set1(1.0f) + load_up_to(weight + i, n);
    store_up_to(out + i, load_up_to(x + i, n) * scale * w, n);
  });
  int64_t half = p.rotary / 2;
  for_vectors(half, [&](int64_t i, int n) {
    Vf c = load_up_to(cos_sin + i, n), s = load_up_to(cos_sin + half + i, n);
    Vf a = load_up_to(out + i, n), b = load_up_to(out + half + i, n);
    store_up_to(out + i, fnma(b, s, a * c), n);
    store_up_to(out + half + i, fma(a, s, b * c), n);
  });
}

void write_key(uint32_t* k, int64_t lane, const uint32_t* key, int64_t steps) {
  for (int64_t s = 0; s < steps; s++) k[s * kGroup + lane] = key[s];
}

// The value of an even token also clears its neighbour, so that a word never holds what an earlier
// owner of the block left: 0 times a stale NaN would be NaN.
void write_value(PairBf16, uint32_t* v, int64_t lane, int64_t width, const void* value, int64_t hd) {
  uint32_t* to = v + lane / 2 * width;
  auto* from = (const bf16*)value;
  if (lane % 2 == 0) {
    for (int64_t i = 0; i < hd; i++) to[i] = from[i];
  } else {
    for (int64_t i = 0; i < hd; i++) to[i] = (to[i] & 0xffff) | uint32_t(from[i]) << 16;
  }
}
void write_value(OneFloat, uint32_t* v, int64_t lane, int64_t width, const void* value, int64_t hd) {
  std::memcpy(v + lane * width, value, size_t(hd) * 4);
}

// scores[R][kKeys] at 16 g: q rows times the keys of `G` groups.
template <class D, int G, int R>
void score_tile(const uint32_t* const* groups, const uint32_t* q, int64_t q_stride, int64_t steps,
                float* scores) {
  constexpr int V = kGroup / Vf::W;
  Vf acc[R][G][V];
  for (int m = 0; m < R; m++)
    for (int g = 0; g < G; g++)
      for (int v = 0; v < V; v++) acc[m][g][v] = zero();
  for (int64_t s = 0; s < steps; s++) {
    typename D::Word b[G][V];
    for (int g = 0; g < G; g++)
      for (int v = 0; v < V; v++) b[g][v] = D::weights(groups[g] + s * kGroup + v * Vf::W);
    for (int m = 0; m < R; m++) {
      typename D::Word a = D::input(q + m * q_stride + s);
      for (int g = 0; g < G; g++)
        for (int v = 0; v < V; v++) D::multiply(acc[m][g][v], b[g][v], a);
    }
  }
  for (int m = 0; m < R; m++)
    for (int g = 0; g < G; g++)
      for (int v = 0; v < V; v++) store(scores + m * kKeys + g * kGroup + v * Vf::W, acc[m][g][v]);
}

// o[R][V vectors] += p rows times the values of a chunk; group g has pairs[g] key words.
template <class D, int V, int R>
void value_tile(const uint32_t* const* groups, const int64_t* pairs, int num_groups, int64_t width,
                const uint32_t* p, int64_t p_stride, int64_t pairs_per_group, float* o,
                int64_t o_stride) {
  Vf acc[R][V];
  for (int m = 0; m < R; m++)
    for (int v = 0; v < V; v++) acc[m][v] = load(o + m * o_stride + v * Vf::W);
  for (int g = 0; g < num_groups; g++) {
    const uint32_t* w = groups[g];
    const uint32_t* a = p + g * pairs_per_group;
    for (int64_t s = 0; s < pairs[g]; s++, w += width, a++) {
      typename D::Word b[V];
      for (int v = 0; v < V; v++) b[v] = D::weights(w + v * Vf::W);
      for (int m = 0; m < R; m++) {
        typename D::Word x = D::input(a + m * p_stride);
        for (int v = 0; v < V; v++) D::multiply(acc[m][v], b[v], x);
      }
    }
  }
  for (int m = 0; m < R; m++)
    for (int v = 0; v < V; v++) store(o + m * o_stride + v * Vf::W, acc[m][v]);
}

// The online softmax of every (token, head) between two sections of keys.
struct Running {
  float* rows;  // [T, heads][width + kGroup + 1]: unscaled output, sums by key lane, maximum
  int64_t width;
  int64_t stride() const { return width + kGroup + 1; }
  void load(int64_t row, float* o, float* total, float* top) const {
    const float* from = rows + row * stride();
    std::memcpy(o, from, size_t(width) * 4);
    std::memcpy(total, from + width, kGroup * 4);
    *top = from[width + kGroup];
  }
  void store(int64_t row, const float* o, const float* total, float top) const {
    float* to = rows + row * stride();
    std::memcpy(to, o, size_t(width) * 4);
    std::memcpy(to + width, total, kGroup * 4);
    to[width + kGroup] = top;
  }
};

template <class D>
class Attention {
 public:
  using Elem = typename D::Elem;
  const Layer& p;
  const Cache& kv;
  const Batch& batch;
  const float* qkv;
  const float* cos_sin;
  int64_t row;      // elements of a row of qkv
  uint32_t* q;      // [T, heads, steps]
  float* out;

  // Norms, rotary and cache writes of the tokens [i0, i1) of sequence s.
  void write(int64_t s, int64_t i0, int64_t i1) {
    float* x = (float*)thread_scratch(size_t(round_up(p.hd, 16) * 2) * 4);
    auto* words = (uint32_t*)(x + round_up(p.hd, 16));
    for (int64_t i = i0; i < i1; i++) {
      int64_t t = batch.query_start[s] + i, position = batch.context_lens[s] + i;
      const float* from = qkv + t * row;
      const float* angles = cos_sin + t * p.rotary;
      for (int64_t h = 0; h < p.heads; h++) {
        norm_and_rotate(from + 2 * h * p.hd, p.q_norm, p, angles, x);
        pack_row<D>(q + (t * p.heads + h) * kv.steps, x, kFloat32, p.hd);
      }
      int64_t block = batch.block_tables[s * batch.max_blocks + position / kv.block_size];
      int64_t group = position % kv.block_size / kGroup, lane = position % kv.block_size % kGroup;
      const float* k = from + 2 * p.heads * p.hd;
      const float* v = k + p.kv_heads * p.hd;
      for (int64_t h = 0; h < p.kv_heads; h++) {
        norm_and_rotate(k + h * p.hd, p.k_norm, p, angles, x);
        pack_row<D>(words, x, kFloat32, p.hd);
        write_key(kv.k(block, h, group), lane, words, kv.steps);
        pack_row<D>(words, v + h * p.hd, kFloat32, p.hd);
        write_value(D(), kv.v(block, h, group), lane, kv.width, words, p.hd);
      }
    }
  }

  // The query tokens [i0, i1) of sequence s, all heads of one KV head, over the whole past.
  void attend(int64_t s, int64_t kv_head, int64_t i0, int64_t i1) {
    Rows r = rows_of(s, kv_head, i0, i1);
    Tile t = allocate(r.count);
    load_queries(t, r);
    clear(t, r.count);
    visit(t, r, batch.block_tables + s * batch.max_blocks, r.first, r.last());
    finish(t, r);
  }

  // The same over `keys` tokens that all of the queries see, at `table`, or, where that is null, over
  // the causal rest, at the sequence's own blocks.
  void attend_section(int64_t kv_head, int64_t i0, int64_t i1, const int32_t* table, int64_t keys,
                      const Running& running) {
    Rows r = rows_of(0, kv_head, i0, i1);
    Tile t = allocate(r.count);
    load_queries(t, r);
    for (int64_t m = 0; m < r.count; m++) running.load(r.index(p, m), t.o + m * kv.width, t.total + m * kGroup, t.top + m);
    if (table != nullptr) {
      visit(t, r, table, keys, keys - 1);
      for (int64_t m = 0; m < r.count; m++) running.store(r.index(p, m), t.o + m * kv.width, t.total + m * kGroup, t.top[m]);
    } else {
      visit(t, r, batch.block_tables, r.first, r.last());
      finish(t, r);
    }
  }

 private:
  struct Tile {
    uint32_t* q;      // [rows, steps]
    float* o;         // [rows, width]
    float* total;     // [rows, 16] sums of exp, by key lane
    float* top;       // [rows] running maximum
    float* scores;    // [kRows, kKeys]
    uint32_t* probs;  // [kRows, kKeys / pair]
  };
  // Rows of a tile: by token, then by the heads of one KV head.
  struct Rows {
    int64_t count, per, token, head;  // heads of a KV head; the first row's token and head
    int64_t first;                    // position of the first token
    int64_t last() const { return first + count / per - 1; }
    int64_t index(const Layer& p, int64_t m) const { return (token + m / per) * p.heads + head + m % per; }
  };
  struct Chunk {
    int groups = 0;
    const uint32_t* k[kChunk];
    const uint32_t* v[kChunk];
    int64_t start[kChunk], end[kChunk];  // positions of its first and last key
    int64_t pairs[kChunk];
  };

  Rows rows_of(int64_t s, int64_t kv_head, int64_t i0, int64_t i1) const {
    int64_t per = p.heads / p.kv_heads;
    return {(i1 - i0) * per, per, batch.query_start[s] + i0, kv_head * per, batch.context_lens[s] + i0};
  }

  void load_queries(Tile& t, const Rows& r) {
    for (int64_t m = 0; m < r.count; m++) {
      std::memcpy(t.q + m * kv.steps, q + r.index(p, m) * kv.steps, size_t(kv.steps) * 4);
    }
  }

  void clear(Tile& t, int64_t rows) {
    for (int64_t m = 0; m < rows; m++) t.top[m] = -std::numeric_limits<float>::infinity();
    std::memset(t.o, 0, size_t(rows * kv.width) * 4);
    std::memset(t.total, 0, size_t(rows * kGroup) * 4);
  }

  // Keys 0 .. last of a block table, for queries that stand at `first` and on. The head of the KV
  // cache follows from the rows' first head.
  void visit(Tile& t, const Rows& r, const int32_t* table, int64_t first, int64_t last) {
    int64_t position = 0, index = 0;  // next key, next group of the sequence
    while (position <= last) {
      Chunk c = next_chunk(table, r.head / r.per, last, &position, &index);
      int64_t skip = std::max<int64_t>(0, c.start[0] - first) * r.per;  // tokens before the chunk
      for (int64_t m = skip; m < r.count; m += kRows) {
        chunk_rows(c, t, m, int(std::min<int64_t>(kRows, r.count - m)), first, r.per);
      }
    }
  }

  Tile allocate(int64_t rows) {
    int64_t probs = kKeys / D::K;
    int64_t count = rows * (round_up(kv.steps, 16) + kv.width + kGroup + 1) + kRows * (kKeys + probs) + 64;
    auto* at = (float*)thread_scratch(size_t(count) * 4);
    auto take = [&](int64_t n) { return std::exchange(at, at + n); };
    Tile t;
    t.o = take(rows * kv.width);
    t.total = take(rows * kGroup);
    t.scores = take(kRows * kKeys);
    t.probs = (uint32_t*)take(kRows * probs);
    t.q = (uint32_t*)take(rows * kv.steps);
    t.top = take(rows);
    return t;
  }

  Chunk next_chunk(const int32_t* table, int64_t kv_head, int64_t last, int64_t* position,
                   int64_t* index) {
    Chunk c;
    for (; c.groups < kChunk && *position <= last; ++*index) {
      int64_t block = table[*index / kv.groups], group = *index % kv.groups, g = c.groups++;
      int64_t size = std::min<int64_t>(kGroup, kv.block_size - group * kGroup);
      c.k[g] = kv.k(block, kv_head, group);
      c.v[g] = kv.v(block, kv_head, group);
      c.start[g] = *position;
      c.end[g] = *position + size - 1;
      c.pairs[g] = (std::min(last, c.end[g]) - c.start[g]) / D::K + 1;
      *position += size;
    }
    for (int g = c.groups; g < kChunk; g++) {  // harmless, and masked
      c.k[g] = c.k[0];
      c.start[g] = c.end[g] = std::numeric_limits<int32_t>::max();
    }
    return c;
  }

  void chunk_rows(const Chunk& c, Tile& t, int64_t m0, int rows, int64_t first, int64_t per) {
    for (int g = 0; g < kChunk; g += kScoreGroups) {
      scores_of<kRows>(rows, c.k + g, t.q + m0 * kv.steps, t.scores + g * kGroup);
    }
    for (int m = 0; m < rows; m++) softmax(c, t, m0 + m, m, first + (m0 + m) / per);
    int64_t column = 0;
    for (; column + kValueVectors * Vf::W <= kv.width; column += kValueVectors * Vf::W) {
      values_of<kValueVectors, kRows>(rows, c, t, m0, column);
    }
    for (; column < kv.width; column += kGrain) {
      values_of<kGrain / Vf::W, kRows>(rows, c, t, m0, column);
    }
  }

  // Turn a row of scores into probabilities relative to the running maximum.
  void softmax(const Chunk& c, Tile& t, int64_t row_index, int m, int64_t position) {
    constexpr int V = kKeys / Vf::W;
    float* scores = t.scores + m * kKeys;
    Vf none = set1(-std::numeric_limits<float>::infinity()), top = none, x[V];
    for (int v = 0; v < V; v++) {
      int g = v * Vf::W / kGroup, lane = v * Vf::W % kGroup;
      x[v] = keep_up_to(load(scores + v * Vf::W) * set1(p.scale), c.start[g] + lane,
                        std::min(position, c.end[g]), none);
      top = max(top, x[v]);
    }
    float old = t.top[row_index], now = std::max(old, largest(top));
    float* sums = t.total + row_index * kGroup;
    if (now != old) {
      Vf factor = exp(set1(old) - set1(now));
      for (int i = 0; i < kGroup; i += Vf::W) store(sums + i, load(sums + i) * factor);
      float* o = t.o + row_index * kv.width;
      for (int64_t i = 0; i < kv.width; i += Vf::W) store(o + i, load(o + i) * factor);
      t.top[row_index] = now;
    }
    auto* probs = (Elem*)(t.probs + m * (kKeys / D::K));
    for (int v = 0; v < V; v++) {
      Vf e = exp(x[v] - set1(now));
      float* sum = sums + v * Vf::W % kGroup;
      store(sum, load(sum) + e);
      store(probs + v * Vf::W, e);
    }
  }

  void finish(const Tile& t, const Rows& r) {
    for (int64_t m = 0; m < r.count; m++) {
      Vf total = zero();
      for (int i = 0; i < kGroup; i += Vf::W) total = total + load(t.total + m * kGroup + i);
      Vf scale = set1(1.0f / sum(total));
      int64_t head = r.head + m % r.per;
      const float* gate = qkv + (r.token + m / r.per) * row + (2 * head + 1) * p.hd;
      float* to = out + r.index(p, m) * p.hd;
      for_vectors(p.hd, [&](int64_t i, int n) {
        Vf o = load(t.o + m * kv.width + i) * scale;
        store_up_to(to + i, o * sigmoid(load_up_to(gate + i, n)), n);
      });
    }
  }

  template <int R>
  void scores_of(int rows, const uint32_t* const* groups, const uint32_t* rows_q, float* scores) {
    if (rows == R) return score_tile<D, kScoreGroups, R>(groups, rows_q, kv.steps, kv.steps, scores);
    if constexpr (R > 1) scores_of<R - 1>(rows, groups, rows_q, scores);
  }

  template <int V, int R>
  void values_of(int rows, const Chunk& c, Tile& t, int64_t m0, int64_t column) {
    if (rows == R) {
      const uint32_t* v[kChunk];
      for (int g = 0; g < c.groups; g++) v[g] = c.v[g] + column;
      return value_tile<D, V, R>(v, c.pairs, c.groups, kv.width, t.probs, kKeys / D::K, kv.pairs,
                                 t.o + m0 * kv.width + column, kv.width);
    }
    if constexpr (R > 1) values_of<V, R - 1>(rows, c, t, m0, column);
  }
};

// A sequence's tokens cut where positions are multiples of `size`.
struct Piece {
  int64_t s, i0, i1;
};
std::vector<Piece> pieces(const Batch& b, int64_t size) {
  std::vector<Piece> found;
  for (int64_t s = 0; s < b.sequences; s++) {
    int64_t context = b.context_lens[s];
    for (int64_t i = 0; i < b.length(s);) {
      int64_t end = std::min(b.length(s), i + size - (context + i) % size);
      found.push_back({s, i, end});
      i = end;
    }
  }
  return found;
}

// Tokens of a task: as many as fill `kTaskRows` rows, fewer where that leaves threads without work.
int64_t task_tokens(const Layer& p, int64_t tokens, int threads) {
  int64_t size = std::max(kLeastTaskTokens, kTaskRows * p.kv_heads / p.heads / kLeastTaskTokens * kLeastTaskTokens);
  while (size > kLeastTaskTokens && tokens * p.kv_heads < 4 * threads * size) size /= 2;
  return size;
}

// Norms, rotary, and the new tokens' keys and values into the cache.
template <class D>
void write_all(Region& region, Attention<D>& a) {
  // Cut between groups: two threads never write into one word of V.
  auto writes = pieces(a.batch, a.kv.block_size % kGroup ? a.kv.block_size : kGroup);
  region.run(int64_t(writes.size()), [&](int64_t i) { a.write(writes[i].s, writes[i].i0, writes[i].i1); });
}

// f(piece, KV head) of every task, the longest first.
template <class D, class F>
void for_tasks(Region& region, const Attention<D>& a, const F& f) {
  const Layer& p = a.p;
  int64_t tokens = a.batch.query_start[a.batch.sequences];
  auto tiles = pieces(a.batch, task_tokens(p, tokens, region.threads()));
  int64_t count = int64_t(tiles.size());
  region.run(count * p.kv_heads, [&](int64_t i) { f(tiles[count - 1 - i / p.kv_heads], i % p.kv_heads); });
}

template <class D>
void attention(const Layer& p, const Cache& kv, const Batch& batch, const float* qkv,
               const float* cos_sin, float* out) {
  Region region;
  int64_t tokens = batch.query_start[batch.sequences];
  Attention<D> a{p, kv, batch, qkv, cos_sin, 2 * (p.heads + p.kv_heads) * p.hd,
                 region.scratch<uint32_t>(tokens * p.heads * kv.steps), out};
  write_all(region, a);
  for_tasks(region, a, [&](const Piece& t, int64_t kv_head) { a.attend(t.s, kv_head, t.i0, t.i1); });
}

enum Phase : int { kBegin = 0, kSection = 1, kEnd = 2 };

// One sequence whose past comes in sections. `work` holds the packed queries, then `Running`.
template <class D>
void attention_section(int phase, const Layer& p, const Cache& kv, const Batch& batch, const float* qkv,
                       const float* cos_sin, const int32_t* table, int64_t keys, float* work, float* out) {
  Region region;
  int64_t rows = batch.query_start[1] * p.heads;
  Attention<D> a{p, kv, batch, qkv, cos_sin, 2 * (p.heads + p.kv_heads) * p.hd, (uint32_t*)work, out};
  Running running{work + rows * kv.steps, kv.width};
  if (phase == kBegin) {
    write_all(region, a);
    std::memset(running.rows, 0, size_t(rows * running.stride()) * 4);
    for (int64_t i = 0; i < rows; i++) {
      running.rows[i * running.stride() + kv.width + kGroup] = -std::numeric_limits<float>::infinity();
    }
    return;
  }
  const int32_t* section = phase == kSection ? table : nullptr;
  for_tasks(region, a, [&](const Piece& t, int64_t kv_head) {
    a.attend_section(kv_head, t.i0, t.i1, section, keys, running);
  });
}

}  // namespace
}  // namespace em

extern "C" {

int64_t em_kv_block_bytes(int dtype, int64_t block_size, int64_t kv_heads, int64_t hd) {
  return 4 * em::Cache(nullptr, dtype, block_size, kv_heads, hd).block;
}

void em_attention(const float* qkv, const float* cos_sin, void* cache, int cache_dtype,
                  int64_t block_size, const int32_t* query_start, const int32_t* context_lens,
                  const int32_t* block_tables, int64_t sequences, int64_t max_blocks, int64_t heads,
                  int64_t kv_heads, int64_t hd, int64_t rotary, float scale, float eps,
                  const float* q_norm, const float* k_norm, float* out) {
  using namespace em;
  Layer layer{heads, kv_heads, hd, rotary, scale, eps, q_norm, k_norm};
  Cache kv(cache, cache_dtype, block_size, kv_heads, hd);
  Batch batch{query_start, context_lens, block_tables, sequences, max_blocks};
  cache_dtype == kFloat32 ? attention<OneFloat>(layer, kv, batch, qkv, cos_sin, out)
                          : attention<PairBf16>(layer, kv, batch, qkv, cos_sin, out);
}

// Floats that one token needs between the calls of em_attention_section.
int64_t em_attention_work(int cache_dtype, int64_t heads, int64_t hd) {
  em::Cache kv(nullptr, cache_dtype, em::kGroup, 1, hd);
  return heads * (kv.steps + em::Running{nullptr, kv.width}.stride());
}

// One sequence in three phases: 0 writes the new tokens into `cache` at `block_table` and packs the
// queries; 1, any number of times, adds `keys` older tokens (a multiple of 64) that lie in `cache` at
// `block_table`; 2 adds the tokens that 0 found and wrote and applies the gate. `context_len` counts
// the tokens in front of the new ones that stay in the cache of phases 0 and 2.
void em_attention_section(int phase, const float* qkv, const float* cos_sin, void* cache,
                          int cache_dtype, int64_t block_size, int64_t tokens, int64_t context_len,
                          const int32_t* block_table, int64_t keys, int64_t heads, int64_t kv_heads,
                          int64_t hd, int64_t rotary, float scale, float eps, const float* q_norm,
                          const float* k_norm, float* work, float* out) {
  using namespace em;
  Layer layer{heads, kv_heads, hd, rotary, scale, eps, q_norm, k_norm};
  Cache kv(cache, cache_dtype, block_size, kv_heads, hd);
  int32_t query_start[2] = {0, int32_t(tokens)}, context = int32_t(context_len);
  Batch batch{query_start, &context, block_table, 1, 0};
  auto run = cache_dtype == kFloat32 ? attention_section<OneFloat> : attention_section<PairBf16>;
  run(phase, layer, kv, batch, qkv, cos_sin, block_table, keys, work, out);
}
}
