// Paged causal attention from the input projection to the output gate.
//
// Layout of the cache: kv_cache.h.
//
// Keys are visited from position 0 in chunks of `kChunk` groups with an online softmax. A query sees
// the same chunks in the same order whoever shares its tile, batch or prefill chunk, and skips chunks
// behind its own position, so its bits depend on its own sequence alone.
#include <limits>
#include <utility>
#include <vector>

#include "entry.h"
#include "kv_cache.h"
#include "pool.h"

namespace em {
namespace {

constexpr int kChunk = 4;          // groups between two looks at the running maximum
constexpr int kKeys = kGroup * kChunk;
constexpr int64_t kTileTokens = 16;  // query tokens of a task
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

  // The query tokens [i0, i1) of sequence s, all heads of one KV head.
  void attend(int64_t s, int64_t kv_head, int64_t i0, int64_t i1) {
    int64_t per = p.heads / p.kv_heads, rows = (i1 - i0) * per, t0 = batch.query_start[s] + i0;
    int64_t first = batch.context_lens[s] + i0, last = first + (i1 - i0) - 1;  // positions
    Tile t = allocate(rows);
    for (int64_t m = 0; m < rows; m++) {  // rows by token, then head
      std::memcpy(t.q + m * kv.steps, q + ((t0 + m / per) * p.heads + kv_head * per + m % per) * kv.steps,
                  size_t(kv.steps) * 4);
      t.top[m] = -std::numeric_limits<float>::infinity();
    }
    std::memset(t.o, 0, size_t(rows * kv.width) * 4);
    std::memset(t.total, 0, size_t(rows * kGroup) * 4);

    int64_t position = 0, index = 0;  // next key, next group of the sequence
    while (position <= last) {
      Chunk c = next_chunk(s, kv_head, last, &position, &index);
      int64_t skip = std::max<int64_t>(0, c.start[0] - first) * per;  // tokens before the chunk
      for (int64_t m = skip; m < rows; m += kRows) {
        chunk_rows(c, t, m, int(std::min<int64_t>(kRows, rows - m)), first, per);
      }
    }
    for (int64_t m = 0; m < rows; m++) finish(t, m, t0 + m / per, kv_head * per + m % per);
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
  struct Chunk {
    int groups = 0;
    const uint32_t* k[kChunk];
    const uint32_t* v[kChunk];
    int64_t start[kChunk], end[kChunk];  // positions of its first and last key
    int64_t pairs[kChunk];
  };

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

  Chunk next_chunk(int64_t s, int64_t kv_head, int64_t last, int64_t* position, int64_t* index) {
    Chunk c;
    for (; c.groups < kChunk && *position <= last; ++*index) {
      int64_t block = batch.block_tables[s * batch.max_blocks + *index / kv.groups];
      int64_t group = *index % kv.groups, g = c.groups++;
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

  void finish(const Tile& t, int64_t m, int64_t token, int64_t head) {
    Vf total = zero();
    for (int i = 0; i < kGroup; i += Vf::W) total = total + load(t.total + m * kGroup + i);
    Vf scale = set1(1.0f / sum(total));
    const float* gate = qkv + token * row + (2 * head + 1) * p.hd;
    float* to = out + (token * p.heads + head) * p.hd;
    for_vectors(p.hd, [&](int64_t i, int n) {
      Vf o = load(t.o + m * kv.width + i) * scale;
      store_up_to(to + i, o * sigmoid(load_up_to(gate + i, n)), n);
    });
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

template <class D>
void attention(const Layer& p, const Cache& kv, const Batch& batch, const float* qkv,
               const float* cos_sin, float* out) {
  Region region;
  int64_t tokens = batch.query_start[batch.sequences];
  Attention<D> a{p, kv, batch, qkv, cos_sin, 2 * (p.heads + p.kv_heads) * p.hd,
                 region.scratch<uint32_t>(tokens * p.heads * kv.steps), out};
  // Cut between groups: two threads never write into one word of V.
  auto writes = pieces(batch, kv.block_size % kGroup ? kv.block_size : kGroup);
  region.run(int64_t(writes.size()), [&](int64_t i) { a.write(writes[i].s, writes[i].i0, writes[i].i1); });
  auto tiles = pieces(batch, kTileTokens);
  int64_t count = int64_t(tiles.size());
  region.run(count * p.kv_heads, [&](int64_t i) {
    const Piece& tile = tiles[count - 1 - i / p.kv_heads];  // the longest first
    a.attend(tile.s, i % p.kv_heads, tile.i0, tile.i1);
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
}
