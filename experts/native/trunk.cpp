// The small operations of the trunk: embedding, RMS norms, SwiGLU, the gate's top-k, the shared
// expert's merge. Rows are independent; every sum over a row runs in one fixed order.
#include <limits>

#include "entry.h"
#include "pack.h"
#include "pool.h"

namespace em {
namespace {

constexpr int64_t kTaskElements = 16384;  // a row count below this stays on the calling thread

template <class F>
void for_rows(int64_t rows, int64_t width, const F& f) {
  int64_t some = std::max<int64_t>(1, kTaskElements / std::max<int64_t>(1, width));
  if (rows <= some) {
    for (int64_t r = 0; r < rows; r++) f(r);
    return;
  }
  Region region;
  region.run((rows + some - 1) / some, [&](int64_t t) {
    for (int64_t r = t * some; r < std::min(rows, (t + 1) * some); r++) f(r);
  });
}

float inverse_rms(Vf squares, int64_t width, float eps) {
  return 1.0f / std::sqrt(sum(squares) / float(width) + eps);
}

// Softmax, then the k largest (ties to the lower id), scaled to sum 1.
void choose(const float* logits, int64_t experts, int64_t top_k, float* p, int32_t* ids,
            float* weights) {
  Vf top = set1(-std::numeric_limits<float>::infinity());
  for_vectors(experts, [&](int64_t i, int n) {
    top = max(n == Vf::W ? load(logits + i) : keep_up_to(load(logits + i, n), 0, n - 1, top), top);
  });
  Vf shift = set1(largest(top)), total = zero();
  for_vectors(experts, [&](int64_t i, int n) {
    Vf e = exp(load_up_to(logits + i, n) - shift);
    store_up_to(p + i, e, n);
    total = total + (n == Vf::W ? e : keep_up_to(e, 0, n - 1, zero()));
  });
  Vf scale = set1(sum(total));
  for_vectors(experts, [&](int64_t i, int n) {
    store_up_to(p + i, load_up_to(p + i, n) / scale, n);
  });
  float kept = 0;
  for (int64_t k = 0; k < top_k; k++) {
    Vf best = set1(-1.0f);
    for_vectors(experts, [&](int64_t i, int n) {
      best = max(n == Vf::W ? load(p + i) : keep_up_to(load(p + i, n), 0, n - 1, best), best);
    });
    float value = largest(best);
    int64_t id = 0;
    while (id < experts && p[id] != value) id++;
    if (id == experts) {  // NaN logits: some valid ids, and a weight that says so
      id = k;
      value = std::numeric_limits<float>::quiet_NaN();
    }
    ids[k] = int32_t(id);
    weights[k] = value;
    kept += value;
    p[id] = -2.0f;
  }
  for (int64_t k = 0; k < top_k; k++) weights[k] /= kept;
}

}  // namespace
}  // namespace em

extern "C" {

void em_embed(const int64_t* ids, int64_t count, const void* table, int dtype, int64_t width,
              float* out) {
  using namespace em;
  for_rows(count, width, [&](int64_t r) {
    convert(out + r * width, (const char*)table + ids[r] * width * size_of(dtype), dtype, width);
  });
}

// out = x / rms(x) * (1 + weight).
void em_rms_norm(const float* x, int64_t rows, int64_t width, const float* weight, float eps,
                 float* out) {
  using namespace em;
  for_rows(rows, width, [&](int64_t r) {
    const float* from = x + r * width;
    Vf squares = zero();
    for_vectors(width, [&](int64_t i, int n) {
      Vf a = load_up_to(from + i, n);
      squares = fma(a, a, squares);
    });
    Vf scale = set1(inverse_rms(squares, width, eps));
    for_vectors(width, [&](int64_t i, int n) {
      Vf w = set1(1.0f) + load_up_to(weight + i, n);
      store_up_to(out + r * width + i, load_up_to(from + i, n) * scale * w, n);
    });
  });
}

// residual += delta; out = residual / rms(residual) * (1 + weight).
void em_add_rms_norm(float* residual, const float* delta, int64_t rows, int64_t width,
                     const float* weight, float eps, float* out) {
  using namespace em;
  for_rows(rows, width, [&](int64_t r) {
    float* x = residual + r * width;
    Vf squares = zero();
    for_vectors(width, [&](int64_t i, int n) {
      Vf a = load_up_to(x + i, n) + load_up_to(delta + r * width + i, n);
      store_up_to(x + i, a, n);
      squares = fma(a, a, squares);
    });
    Vf scale = set1(inverse_rms(squares, width, eps));
    for_vectors(width, [&](int64_t i, int n) {
      Vf w = set1(1.0f) + load_up_to(weight + i, n);
      store_up_to(out + r * width + i, load_up_to(x + i, n) * scale * w, n);
    });
  });
}

// out[r] = silu(gate_up[r][:size]) * gate_up[r][size:2 size].
void em_swiglu(const float* gate_up, int64_t rows, int64_t row_elements, int64_t size, float* out) {
  using namespace em;
  for_rows(rows, 4 * size, [&](int64_t r) {
    const float* gate = gate_up + r * row_elements;
    for_vectors(size, [&](int64_t i, int n) {
      Vf h = silu(load_up_to(gate + i, n)) * load_up_to(gate + size + i, n);
      store_up_to(out + r * size + i, h, n);
    });
  });
}

void em_gate_topk(const float* logits, int64_t rows, int64_t experts, int64_t top_k, int32_t* ids,
                  float* weights) {
  using namespace em;
  for_rows(rows, experts * (top_k + 4), [&](int64_t r) {
    auto* p = (float*)thread_scratch(size_t(experts) * 4);
    choose(logits + r * experts, experts, top_k, p, ids + r * top_k, weights + r * top_k);
  });
}

// routed[r] += sigmoid(gate[r]) * shared[r].
void em_add_shared(float* routed, const float* shared, const float* gate, int64_t gate_stride,
                   int64_t rows, int64_t width) {
  using namespace em;
  for_rows(rows, width, [&](int64_t r) {
    Vf g = sigmoid(set1(gate[r * gate_stride]));
    for_vectors(width, [&](int64_t i, int n) {
      float* to = routed + r * width + i;
      store_up_to(to, fma(g, load_up_to(shared + r * width + i, n), load_up_to(to, n)), n);
    });
  });
}
}
