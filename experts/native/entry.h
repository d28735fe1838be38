// The kernels that other kernels call. The files that define them include this one, so that a changed signature does not compile.

#pragma once

#include <cstdint>

extern "C" {

void em_linear(const void* w, int w_dtype, int64_t n, int64_t k, const void* x, int x_dtype, int64_t m,
               int64_t x_row_bytes, void* y, int y_dtype, int64_t y_row_elements);
void em_embed(const int64_t* ids, int64_t count, const void* table, int dtype, int64_t width, float* out);
void em_rms_norm(const float* x, int64_t rows, int64_t width, const float* weight, float eps, float* out);
void em_add_rms_norm(float* residual, const float* delta, int64_t rows, int64_t width, const float* weight, float eps,
                     float* out);
void em_swiglu(const float* gate_up, int64_t rows, int64_t row_elements, int64_t size, float* out);
void em_gate_topk(const float* logits, int64_t rows, int64_t experts, int64_t top_k, int32_t* ids, float* weights);
void em_add_shared(float* routed, const float* shared, const float* gate, int64_t gate_stride, int64_t rows,
                   int64_t width);
void em_gated_delta_net(const float* mixed, const int32_t* query_start, const int32_t* context_lens,
                        const int32_t* state_slots, int64_t sequences, const float* conv_weight, const float* decay,
                        const float* dt_bias, const float* norm_weight, int64_t key_heads, int64_t value_heads,
                        int64_t dk, int64_t dv, int64_t taps, float eps, float* conv_state, float* memory, float* out);
void em_attention(const float* qkv, const float* cos_sin, void* cache, int cache_dtype, int64_t block_size,
                  const int32_t* query_start, const int32_t* context_lens, const int32_t* block_tables,
                  int64_t sequences, int64_t max_blocks, int64_t heads, int64_t kv_heads, int64_t hd, int64_t rotary,
                  float scale, float eps, const float* q_norm, const float* k_norm, float* out);
}
