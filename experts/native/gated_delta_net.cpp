// Gated DeltaNet from the input projection to the gated norm, token by token.
//
// One task is one key head of one sequence, with the value heads it serves: their channels of the
// convolution, their memories S [dk, dv] and their output columns belong to nobody else. A task
// walks its tokens in blocks: convolution and norms of the block into scratch, then the delta rule
// for one value head and a few columns of S at a time, so that these columns stay in the first-level
// cache, then the gated norm.
//
//   S <- e^g S + k d^T,  d = beta (v - e^g S^T k),  o = S^T q = e^g S_old^T q + (k . q) d
//
// so one pass over the old S gives both S^T k and S^T q; the update by token t and the two sums for
// token t + 1 share a pass. The sums see the same float32 numbers whether S came from that pass or
// from memory: decode, prefill and any cut into chunks give the same bits.
#include <utility>

#include "entry.h"
#include "pack.h"
#include "pool.h"

namespace em {
namespace {

constexpr int64_t kTokens = 32;  // tokens of a block
constexpr float kL2Eps = 1e-6f;
#if defined(__AVX512BF16__)
constexpr int kColumns = 4;  // vectors of S side by side
#else
constexpr int kColumns = 2;
#endif

struct Layer {
  const float* conv_weight;  // [taps, channels]
  const float* decay;        // [Hv]: -exp(A_log)
  const float* dt_bias;      // [Hv]
  const float* norm_weight;  // [dv]
  int64_t key_heads, value_heads, dk, dv, taps;
  float eps;
};

struct Call {
  Layer p;
  const float* mixed;  // [T, channels + Hv dv + 2 Hv]
  float* conv_state;   // [slots, channels, taps - 1]
  float* memory;       // [slots, Hv, dk, dv]
  float* out;          // [T, Hv dv]
  int64_t channels, row;
};

// One block of tokens of one key head; rows padded to whole vectors.
struct Block {
  float* q;  // [n, dk]
  float* k;
  float* v;      // [n, r dv]
  float* o;      // [n, r dv]
  float* decay;  // [r, n] e^g
  float* beta;   // [r, n]
  float* kq;     // [n] k . q
};

// out[i] = silu(sum_j weight[j][c] x[i - taps + 1 + j][c]) over `count` channels from c; x is row 0
// of the block, `past` the taps - 1 rows before it, oldest first.
void convolve(const Call& c, const float* x, const float* past, int64_t channel, int64_t count,
              int64_t tokens, float* out, int64_t stride) {
  int64_t before = c.p.taps - 1;
  for (int64_t i = 0; i < tokens; i++) {
    for_vectors(count, [&](int64_t e, int n) {
      Vf sum = zero();
      for (int64_t j = 0; j <= before; j++) {
        int64_t at = i - before + j;
        const float* from = at >= 0 ? x + at * c.row + e : past + (at + before) * count + e;
        sum = fma(load_up_to(from, n), load_up_to(c.p.conv_weight + j * c.channels + channel + e, n), sum);
      }
      store_up_to(out + i * stride + e, silu(sum), n);
    });
  }
}

void l2_normalize(float* x, int64_t width, float factor) {
  Vf squares = zero();
  for_vectors(width, [&](int64_t i, int n) {
    Vf a = load_up_to(x + i, n);
    squares = fma(a, a, squares);
  });
  Vf scale = set1(factor / std::sqrt(sum(squares) + kL2Eps));
  for_vectors(width, [&](int64_t i, int n) { store_up_to(x + i, load_up_to(x + i, n) * scale, n); });
}

float softplus(float x) { return x > 20 ? x : std::log1p(std::exp(x)); }

// The delta rule on V vectors of columns of one memory, `lanes` of the last vector (all of them
// where V > 1). `s` is scratch [dk, V * W].
template <int V>
void delta_rule(const Block& b, const float* decay, const float* beta, const float* v, float* o,
                int64_t value_stride, int64_t tokens, int64_t dk, float* memory, int64_t dv, float* s,
                int lanes) {
  constexpr int W = Vf::W;
  int n = V > 1 ? W : lanes;
  Vf by_k[V], by_q[V], d[V];
  for (int j = 0; j < V; j++) by_k[j] = by_q[j] = zero();
  for (int64_t i = 0; i < dk; i++) {
    Vf k = set1(b.k[i]), q = set1(b.q[i]);
    for (int j = 0; j < V; j++) {
      Vf a = load_up_to(memory + i * dv + j * W, n);
      store(s + (i * V + j) * W, a);
      by_k[j] = fma(a, k, by_k[j]);
      by_q[j] = fma(a, q, by_q[j]);
    }
  }
  for (int64_t t = 0; t < tokens; t++) {
    Vf g = set1(decay[t]), step = set1(beta[t]), kq = set1(b.kq[t]);
    for (int j = 0; j < V; j++) {
      d[j] = step * fnma(g, by_k[j], load_up_to(v + t * value_stride + j * W, n));
      store_up_to(o + t * value_stride + j * W, fma(kq, d[j], g * by_q[j]), n);
      by_k[j] = by_q[j] = zero();
    }
    const float* k = b.k + t * dk;
    if (t + 1 == tokens) {
      for (int64_t i = 0; i < dk; i++) {
        for (int j = 0; j < V; j++) {
          Vf a = fma(set1(k[i]), d[j], g * load(s + (i * V + j) * W));
          store_up_to(memory + i * dv + j * W, a, n);
        }
      }
      return;
    }
    const float* next_k = k + dk;
    const float* next_q = b.q + (t + 1) * dk;
    for (int64_t i = 0; i < dk; i++) {
      Vf ki = set1(k[i]), nk = set1(next_k[i]), nq = set1(next_q[i]);
      for (int j = 0; j < V; j++) {
        float* at = s + (i * V + j) * W;
        Vf a = fma(ki, d[j], g * load(at));
        store(at, a);
        by_k[j] = fma(a, nk, by_k[j]);
        by_q[j] = fma(a, nq, by_q[j]);
      }
    }
  }
}

void gated_norm(const Call& c, const float* o, const float* z, float* out) {
  int64_t dv = c.p.dv;
  Vf squares = zero();
  for_vectors(dv, [&](int64_t i, int n) {
    Vf a = load_up_to(o + i, n);
    squares = fma(a, a, squares);
  });
  Vf scale = set1(1.0f / std::sqrt(sum(squares) / float(dv) + c.p.eps));
  for_vectors(dv, [&](int64_t i, int n) {
    Vf normed = load_up_to(o + i, n) * scale * load_up_to(c.p.norm_weight + i, n);
    store_up_to(out + i, normed * silu(load_up_to(z + i, n)), n);
  });
}

class Head {
 public:
  Head(const Call& call, int64_t key_head) : c(call), head(key_head), r(c.p.value_heads / c.p.key_heads) {
    int64_t key_dim = c.p.key_heads * c.p.dk;
    parts[0] = {head * c.p.dk, c.p.dk};
    parts[1] = {key_dim + head * c.p.dk, c.p.dk};
    parts[2] = {2 * key_dim + head * r * c.p.dv, r * c.p.dv};
  }

  // Tokens [first, last) of a sequence whose state is in `slot`.
  void run(int64_t first, int64_t last, bool fresh, int64_t slot) {
    allocate();
    float* conv = c.conv_state + slot * c.channels * (c.p.taps - 1);
    float* memory = c.memory + (slot * c.p.value_heads + head * r) * c.p.dk * c.p.dv;
    load_past(conv, fresh);
    if (fresh) std::memset(memory, 0, size_t(r * c.p.dk * c.p.dv) * 4);
    for (int64_t t = first; t < last; t += kTokens) {
      int64_t n = std::min(kTokens, last - t);
      inputs(t, n);
      for (int64_t h = 0; h < r; h++) rule(h, n, memory + h * c.p.dk * c.p.dv);
      outputs(t, n);
      move_past(t, n);
    }
    store_past(conv);
  }

 private:
  struct Part {
    int64_t channel, count;
  };
  const Call& c;
  int64_t head, r;
  Part parts[3];  // q, k, v channels
  float* past[3];
  Block b;
  float* columns;

  void allocate() {
    int64_t width = 2 * c.p.dk + r * c.p.dv, before = c.p.taps - 1;
    int64_t count = width * before + kTokens * (width + r * c.p.dv + 2 * r + 1) +
                    c.p.dk * kColumns * Vf::W + 128;
    auto* at = (float*)thread_scratch(size_t(count) * 4);
    auto take = [&](int64_t n) { return std::exchange(at, at + n); };
    columns = take(c.p.dk * kColumns * Vf::W);
    for (int i = 0; i < 3; i++) past[i] = take(parts[i].count * before);
    b = {take(kTokens * c.p.dk),     take(kTokens * c.p.dk), take(kTokens * r * c.p.dv),
         take(kTokens * r * c.p.dv), take(kTokens * r),      take(kTokens * r), take(kTokens)};
  }

  void load_past(const float* conv, bool fresh) {
    int64_t before = c.p.taps - 1;
    for (int i = 0; i < 3; i++) {
      const float* from = conv + parts[i].channel * before;
      for (int64_t j = 0; j < before; j++) {
        float* to = past[i] + j * parts[i].count;
        for (int64_t e = 0; e < parts[i].count; e++) to[e] = fresh ? 0 : from[e * before + j];
      }
    }
  }

  void store_past(float* conv) {
    int64_t before = c.p.taps - 1;
    for (int i = 0; i < 3; i++) {
      float* to = conv + parts[i].channel * before;
      for (int64_t j = 0; j < before; j++) {
        const float* from = past[i] + j * parts[i].count;
        for (int64_t e = 0; e < parts[i].count; e++) to[e * before + j] = from[e];
      }
    }
  }

  void move_past(int64_t t, int64_t n) {
    int64_t before = c.p.taps - 1;
    for (int i = 0; i < 3; i++) {
      int64_t count = parts[i].count;
      for (int64_t j = 0; j < before; j++) {
        int64_t at = n - before + j;  // row in the block; negative: still an old one
        const float* from = at >= 0 ? c.mixed + (t + at) * c.row + parts[i].channel
                                    : past[i] + (at + before) * count;
        std::memmove(past[i] + j * count, from, size_t(count) * 4);
      }
    }
  }

  void inputs(int64_t t, int64_t n) {
    float* to[3] = {b.q, b.k, b.v};
    for (int i = 0; i < 3; i++) {
      convolve(c, c.mixed + t * c.row + parts[i].channel, past[i], parts[i].channel, parts[i].count,
               n, to[i], parts[i].count);
    }
    float scale = 1.0f / std::sqrt(float(c.p.dk));
    for (int64_t i = 0; i < n; i++) {
      float *q = b.q + i * c.p.dk, *k = b.k + i * c.p.dk;
      l2_normalize(q, c.p.dk, scale);
      l2_normalize(k, c.p.dk, 1.0f);
      Vf dot = zero();
      for_vectors(c.p.dk, [&](int64_t e, int m) {
        dot = fma(load_up_to(q + e, m), load_up_to(k + e, m), dot);
      });
      b.kq[i] = sum(dot);
      const float* beta = c.mixed + (t + i) * c.row + c.channels + c.p.value_heads * c.p.dv;
      for (int64_t h = 0; h < r; h++) {
        int64_t value_head = head * r + h;
        float g = c.p.decay[value_head] *
                  softplus(beta[c.p.value_heads + value_head] + c.p.dt_bias[value_head]);
        b.decay[h * kTokens + i] = std::exp(g);
        b.beta[h * kTokens + i] = 1.0f / (1.0f + std::exp(-beta[value_head]));
      }
    }
  }

  void rule(int64_t h, int64_t n, float* memory) {
    int64_t dv = c.p.dv, stride = r * dv;
    const float *decay = b.decay + h * kTokens, *beta = b.beta + h * kTokens;
    int64_t j = 0;
    for (; j + kColumns * Vf::W <= dv; j += kColumns * Vf::W) {
      delta_rule<kColumns>(b, decay, beta, b.v + h * dv + j, b.o + h * dv + j, stride, n, c.p.dk,
                           memory + j, dv, columns, Vf::W);
    }
    for (; j < dv; j += Vf::W) {
      delta_rule<1>(b, decay, beta, b.v + h * dv + j, b.o + h * dv + j, stride, n, c.p.dk,
                    memory + j, dv, columns, int(std::min<int64_t>(Vf::W, dv - j)));
    }
  }

  void outputs(int64_t t, int64_t n) {
    int64_t dv = c.p.dv;
    for (int64_t i = 0; i < n; i++) {
      for (int64_t h = 0; h < r; h++) {
        int64_t column = (head * r + h) * dv;
        gated_norm(c, b.o + (i * r + h) * dv, c.mixed + (t + i) * c.row + c.channels + column,
                   c.out + (t + i) * c.p.value_heads * dv + column);
      }
    }
  }
};

}  // namespace
}  // namespace em

extern "C" {

// Sequence s owns the rows [query_start[s], query_start[s + 1]).
void em_gated_delta_net(const float* mixed, const int32_t* query_start, const int32_t* context_lens,
                        const int32_t* state_slots, int64_t sequences, const float* conv_weight,
                        const float* decay, const float* dt_bias, const float* norm_weight,
                        int64_t key_heads, int64_t value_heads, int64_t dk, int64_t dv, int64_t taps,
                        float eps, float* conv_state, float* memory, float* out) {
  using namespace em;
  int64_t channels = 2 * key_heads * dk + value_heads * dv;
  Call call{{conv_weight, decay, dt_bias, norm_weight, key_heads, value_heads, dk, dv, taps, eps},
            mixed, conv_state, memory, out, channels, channels + value_heads * (dv + 2)};
  Region region;
  region.run(sequences * key_heads, [&](int64_t task) {
    int64_t s = task / key_heads;
    Head(call, task % key_heads)
        .run(query_start[s], query_start[s + 1], context_lens[s] == 0, state_slots[s]);
  });
}
}
