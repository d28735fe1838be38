// One step of the trunk in one call, so that neither the interpreter nor its lock stands between two layers.
//
// Decides nothing: it calls the kernels of the other files in the order of router/model/decoder.py, which is its slow twin, bit for
// bit. The plans are laid out by router/model/native_step.py. Activations are float32.

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>

#include "dispatch.h"
#include "entry.h"

namespace em {
namespace {

constexpr int kFloat = 1;

struct LinearPlan {
  const void* weight;
  int64_t code, n, k;

  void run(const float* x, int64_t rows, float* y) const {
    em_linear(weight, int(code), n, k, x, kFloat, rows, k * 4, y, kFloat, n);
  }
};

struct LayerPlan {
  int64_t is_attention, is_moe;
  const float *input_norm, *post_norm;
  LinearPlan in_proj, out_proj;
  // Gated DeltaNet.
  const float *conv_weight, *decay, *dt_bias, *gdn_norm;
  int64_t key_heads, value_heads, dk, dv, taps;
  double gdn_eps;
  float *conv_state, *recurrent_state;
  // Full attention.
  const float *q_norm, *k_norm;
  int64_t heads, kv_heads, head_dim, rotary_dim;
  double scale, attention_eps;
  void* kv;
  int64_t kv_code, block_size;
  // The feed-forward half: the gate of a mixture, and the shared expert or the dense MLP.
  LinearPlan gate, wide, down;
  int64_t size, top_k;
};

struct ModelPlan {
  const LayerPlan* layers;
  int64_t num_layers, hidden;
  double eps;
  const void* embedding;
  int64_t embedding_code;
  const float* final_norm;
  LinearPlan head;
};

struct StepPlan {
  int64_t tokens, sequences, max_blocks, num_logits;
  const int64_t* token_ids;
  const int32_t *query_start, *context_lens, *block_tables, *state_slots;
  const float* cos_sin;
  const int64_t* logit_rows;
  float* logits;
};

// Memory that grows and is kept for the thread's next step.
class Buffer {
 public:
  ~Buffer() { std::free(data_); }
  float* of(int64_t count) {
    if (count > capacity_) {
      std::free(data_);
      capacity_ = (count + count / 4 + 15) / 16 * 16;
      data_ = static_cast<float*>(std::aligned_alloc(64, size_t(capacity_) * 4));
      if (data_ == nullptr) throw std::bad_alloc();
    }
    return data_;
  }

 private:
  float* data_ = nullptr;
  int64_t capacity_ = 0;
};

struct Buffers {
  Buffer residual, x, wide, mixed, delta, gate, weights, ids, shared;
};

// Keeps the wanted rows, which are in increasing order, at the front.
void keep_rows(float* values, int64_t width, const int64_t* rows, int64_t count) {
  for (int64_t i = 0; i < count; i++) {
    if (rows[i] != i) std::memcpy(values + i * width, values + rows[i] * width, size_t(width) * 4);
  }
}

void mix(const LayerPlan& l, const StepPlan& s, const float* wide, float* mixed) {
  if (l.is_attention) {
    em_attention(wide, s.cos_sin, l.kv, int(l.kv_code), l.block_size, s.query_start, s.context_lens, s.block_tables,
                 s.sequences, s.max_blocks, l.heads, l.kv_heads, l.head_dim, l.rotary_dim, float(l.scale),
                 float(l.attention_eps), l.q_norm, l.k_norm, mixed);
  } else {
    em_gated_delta_net(wide, s.query_start, s.context_lens, s.state_slots, s.sequences, l.conv_weight, l.decay,
                       l.dt_bias, l.gdn_norm, l.key_heads, l.value_heads, l.dk, l.dv, l.taps, float(l.gdn_eps),
                       l.conv_state, l.recurrent_state, mixed);
  }
}

// x [rows, hidden] -> delta; false where the experts failed for good. The shared expert is computed while the groups work.
bool feed_forward(const LayerPlan& l, int64_t layer, int64_t hidden, Buffers& b, const float* x, int64_t rows,
                  float* delta, Dispatch* experts) {
  auto* ids = reinterpret_cast<int32_t*>(b.ids.of(rows * l.top_k));
  float* weights = b.weights.of(rows * l.top_k);
  bool is_sent = false;
  if (l.is_moe) {
    float* logits = b.gate.of(rows * l.gate.n);
    l.gate.run(x, rows, logits);
    em_gate_topk(logits, rows, l.gate.n, l.top_k, ids, weights);
    is_sent = dispatch(*experts, layer, x, rows, ids, weights);
  }
  float* wide = b.wide.of(rows * l.wide.n);
  l.wide.run(x, rows, wide);
  float* between = b.mixed.of(rows * l.size);
  em_swiglu(wide, rows, l.wide.n, l.size, between);
  if (!l.is_moe) {
    l.down.run(between, rows, delta);
    return true;
  }
  float* shared = b.shared.of(rows * hidden);
  l.down.run(between, rows, shared);
  if (!(is_sent && collect(*experts, rows, weights, delta)) && !experts->rescue(layer, x, rows, ids, weights, delta)) {
    return false;
  }
  em_add_shared(delta, shared, wide + l.wide.n - 1, l.wide.n, rows, hidden);
  return true;
}

}  // namespace
}  // namespace em

extern "C" {

// Computes a step and updates the caches. Returns -1, or the layer whose experts failed, as `experts` says.
int64_t em_step(const em::ModelPlan* model, const em::StepPlan* step, em::Dispatch* experts) {
  using namespace em;
  const ModelPlan& m = *model;
  const StepPlan& s = *step;
  thread_local Buffers b;
  int64_t rows = s.tokens;
  float* residual = b.residual.of(rows * m.hidden);
  float* x = b.x.of(rows * m.hidden);
  float* delta = b.delta.of(rows * m.hidden);
  em_embed(s.token_ids, rows, m.embedding, int(m.embedding_code), m.hidden, residual);
  for (int64_t i = 0; i < m.num_layers; i++) {
    const LayerPlan& l = m.layers[i];
    if (i == 0) {
      em_rms_norm(residual, rows, m.hidden, l.input_norm, float(m.eps), x);
    } else {
      em_add_rms_norm(residual, delta, rows, m.hidden, l.input_norm, float(m.eps), x);
    }
    float* wide = b.wide.of(rows * l.in_proj.n);
    l.in_proj.run(x, rows, wide);
    float* mixed = b.mixed.of(rows * l.out_proj.k);
    mix(l, s, wide, mixed);
    if (i == m.num_layers - 1 && s.num_logits != rows) {
      if (s.num_logits == 0) return -1;
      rows = s.num_logits;
      keep_rows(mixed, l.out_proj.k, s.logit_rows, rows);
      keep_rows(residual, m.hidden, s.logit_rows, rows);
    }
    l.out_proj.run(mixed, rows, delta);
    em_add_rms_norm(residual, delta, rows, m.hidden, l.post_norm, float(m.eps), x);
    if (!feed_forward(l, i, m.hidden, b, x, rows, delta, experts)) return i;
  }
  em_add_rms_norm(residual, delta, rows, m.hidden, m.final_norm, float(m.eps), x);
  m.head.run(x, rows, s.logits);
  return -1;
}
}
