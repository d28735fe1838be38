// The routed experts of one layer: y = down(silu(gate x) * (up x)) for pairs of (row, slot).
//
// A slot holds one expert, packed as gemm.h says: first gate and up together, panel p holding the
// gate columns [32 p, 32 p + h) and then the up columns of the same numbers (h = 32, or 16 at the
// end), so that a panel's sums hold both factors of SwiGLU; then down. Pairs are sorted by slot;
// each slot's weights are read once per block of rows, however many rows chose it.
#include <vector>

#include "pack.h"
#include "pool.h"

namespace em {
namespace {

constexpr int kHalf = kPanel / 2;
constexpr int64_t kTaskWords = 24 << 10;

struct Shape {
  int64_t hidden, intermediate;
  int64_t hidden_steps, intermediate_steps;
  int64_t wide;            // intermediate rounded up: columns of gate, of up, and of h
  int64_t gate_up_words, down_words;

  Shape(int dtype, int64_t hidden_size, int64_t intermediate_size)
      : hidden(hidden_size), intermediate(intermediate_size), wide(round_up(intermediate, kGrain)) {
    int64_t pair = dtype == kFloat32 ? 1 : 2;
    hidden_steps = (hidden + pair - 1) / pair;
    intermediate_steps = (intermediate + pair - 1) / pair;
    gate_up_words = 2 * wide * hidden_steps;
    down_words = packed_words(hidden, intermediate_steps);
  }
  int64_t slot_words() const { return gate_up_words + down_words; }
};

struct Pairs {
  const int32_t* row;
  const int32_t* slot;
  const float* weight;  // or nullptr
  int64_t count;
};

// One piece of work: the panels [p0, p1) of a slot for the sorted pairs [i0, i1).
struct Task {
  int64_t slot, p0, p1, i0, i1;
};

template <class D>
void fill(uint32_t* to, const Shape& s, const char* gate_up, const char* down, int dtype) {
  Region region;
  int64_t bytes = size_of(dtype), gate_panels = num_panels(2 * s.wide);
  region.run(gate_panels + num_panels(s.hidden), [&](int64_t p) {
    if (p < gate_panels) {
      int width = panel_width(2 * s.wide, p), half = width / 2;
      pack_panel<D>(to + p * kPanel * s.hidden_steps, width, s.hidden, dtype, [&](int c) {
        int64_t column = p * kHalf + c % half;
        int64_t row = c < half ? column : s.intermediate + column;
        return column < s.intermediate ? gate_up + row * s.hidden * bytes : nullptr;
      });
      return;
    }
    p -= gate_panels;
    pack_panel<D>(to + s.gate_up_words + p * kPanel * s.intermediate_steps,
                  panel_width(s.hidden, p), s.intermediate, dtype, [&](int c) {
                    int64_t row = p * kPanel + c;
                    return row < s.hidden ? down + row * s.intermediate * bytes : nullptr;
                  });
  });
}

// Stable counting sort: order[start[key] .. start[key + 1]) are the items with that key.
void sort_by(const int32_t* keys, int64_t count, int64_t num_keys, int64_t* start, int32_t* order) {
  std::fill(start, start + num_keys + 1, 0);
  for (int64_t i = 0; i < count; i++) start[keys[i] + 1]++;
  for (int64_t key = 0; key < num_keys; key++) start[key + 1] += start[key];
  for (int64_t i = 0; i < count; i++) order[start[keys[i]]++] = int32_t(i);
  for (int64_t key = num_keys; key > 0; key--) start[key] = start[key - 1];
  start[0] = 0;
}

std::vector<Task> tasks_of(const int64_t* start, int64_t slots, int64_t panels, int64_t panel_words,
                           int threads) {
  int64_t active = 0;
  for (int64_t s = 0; s < slots; s++) active += start[s + 1] > start[s];
  int64_t fair = std::max<int64_t>(1, active * panels / (threads * 8));
  int64_t group = std::min(fair, std::max<int64_t>(1, kTaskWords / panel_words));
  std::vector<Task> tasks;
  for (int64_t s = 0; s < slots; s++) {
    for (int64_t i = start[s]; i < start[s + 1]; i += kRowBlock) {
      for (int64_t p = 0; p < panels; p += group) {
        tasks.push_back({s, p, std::min(panels, p + group), i, std::min(start[s + 1], i + kRowBlock)});
      }
    }
  }
  return tasks;
}

template <class D>
struct Forward {
  using Elem = typename D::Elem;
  const uint32_t* bank;
  const Shape& s;
  Region& region;
  const int32_t* order;
  const uint32_t** in;        // packed input of sorted pair i
  const uint32_t** between;   // packed h of sorted pair i

  void gate_up(const Task& t) {
    alignas(64) float sums[kRowBlock * kPanel];
    for (int64_t p = t.p0; p < t.p1; p++) {
      int width = panel_width(2 * s.wide, p), half = width / 2, rows = int(t.i1 - t.i0);
      multiply_panel<D>(bank + t.slot * s.slot_words() + p * kPanel * s.hidden_steps, width,
                        s.hidden_steps, in + t.i0, rows, sums);
      for (int m = 0; m < rows; m++) {
        const float* sum = sums + m * kPanel;
        Elem* h = (Elem*)between[t.i0 + m] + p * kHalf;
        for (int c = 0; c < half; c += Vf::W) store(h + c, silu(load(sum + c)) * load(sum + half + c));
      }
    }
  }

  template <class Y>
  void down(const Task& t, Y* y) {
    alignas(64) float sums[kRowBlock * kPanel];
    const uint32_t* w = bank + t.slot * s.slot_words() + s.gate_up_words;
    for (int64_t p = t.p0; p < t.p1; p++) {
      int rows = int(t.i1 - t.i0);
      multiply_panel<D>(w + p * kPanel * s.intermediate_steps, panel_width(s.hidden, p),
                        s.intermediate_steps, between + t.i0, rows, sums);
      int64_t columns = std::min<int64_t>(kPanel, s.hidden - p * kPanel);
      for (int m = 0; m < rows; m++) {
        Y* to = y + order[t.i0 + m] * s.hidden + p * kPanel;
        for_vectors(columns, [&](int64_t c, int n) {
          store_up_to(to + c, load(sums + m * kPanel + c), n);
        });
      }
    }
  }
};

// out[r] = sum of weight * y[p] over the pairs p of row r, in pair order.
void sum_pairs(Region& region, const Pairs& pairs, int64_t rows, int64_t hidden, const float* y,
               float* out) {
  auto* start = region.scratch<int64_t>(rows + 1);
  auto* order = region.scratch<int32_t>(pairs.count);
  sort_by(pairs.row, pairs.count, rows, start, order);
  int64_t some = std::max<int64_t>(1, 16384 / hidden);
  region.run((rows + some - 1) / some, [&](int64_t t) {
    for (int64_t r = t * some; r < std::min(rows, (t + 1) * some); r++) {
      for_vectors(hidden, [&](int64_t c, int n) {
        Vf sum = zero();
        for (int64_t i = start[r]; i < start[r + 1]; i++) {
          int32_t p = order[i];
          sum = fma(set1(pairs.weight ? pairs.weight[p] : 1.0f), load_up_to(y + p * hidden + c, n), sum);
        }
        store_up_to(out + r * hidden + c, sum, n);
      });
    }
  });
}

template <class D>
void forward(const uint32_t* bank, int64_t slots, const Shape& s, const char* x, int x_dtype,
             int64_t rows, int64_t x_row_bytes, const Pairs& pairs, bool partial, void* out,
             int out_dtype) {
  Region region;
  auto* start = region.scratch<int64_t>(slots + 1);
  auto* order = region.scratch<int32_t>(pairs.count);
  sort_by(pairs.slot, pairs.count, slots, start, order);

  bool direct = size_of(x_dtype) * D::K == 4 && s.hidden % D::K == 0;
  uint32_t* packed = direct ? nullptr : region.scratch<uint32_t>(rows * s.hidden_steps);
  if (!direct) {
    int64_t some = std::max<int64_t>(1, 16384 / s.hidden_steps);
    region.run((rows + some - 1) / some, [&](int64_t t) {
      for (int64_t r = t * some; r < std::min(rows, (t + 1) * some); r++) {
        pack_row<D>(packed + r * s.hidden_steps, x + r * x_row_bytes, x_dtype, s.hidden);
      }
    });
  }
  auto* h = region.scratch<typename D::Elem>(pairs.count * s.wide);
  auto** in = region.scratch<const uint32_t*>(pairs.count);
  auto** between = region.scratch<const uint32_t*>(pairs.count);
  for (int64_t i = 0; i < pairs.count; i++) {
    int64_t row = pairs.row[order[i]];
    in[i] = direct ? (const uint32_t*)(x + row * x_row_bytes) : packed + row * s.hidden_steps;
    between[i] = (const uint32_t*)(h + i * s.wide);
  }
  Forward<D> f{bank, s, region, order, in, between};

  auto tasks = tasks_of(start, slots, num_panels(2 * s.wide), kPanel * s.hidden_steps, region.threads());
  region.run(int64_t(tasks.size()), [&](int64_t t) { f.gate_up(tasks[t]); });

  float* y = partial ? region.scratch<float>(pairs.count * s.hidden) : (float*)out;
  tasks = tasks_of(start, slots, num_panels(s.hidden), kPanel * s.intermediate_steps, region.threads());
  region.run(int64_t(tasks.size()), [&](int64_t t) {
    partial || out_dtype == kFloat32 ? f.down(tasks[t], y) : f.down(tasks[t], (bf16*)out);
  });
  if (partial) sum_pairs(region, pairs, rows, s.hidden, y, (float*)out);
}

bool within(const int32_t* values, int64_t count, int64_t bound) {
  uint32_t top = 0;  // a negative value is a very large unsigned one
  for (int64_t i = 0; i < count; i++) top = std::max(top, uint32_t(values[i]));
  return count == 0 || int64_t(top) < bound;
}

}  // namespace
}  // namespace em

extern "C" {

int64_t em_slot_bytes(int dtype, int64_t hidden, int64_t intermediate) {
  return 4 * em::Shape(dtype, hidden, intermediate).slot_words();
}

// gate_up [2 I, H] and down [H, I], contiguous, of dtype `dtype`.
void em_fill_slot(void* bank, int bank_dtype, int64_t slot, int64_t hidden, int64_t intermediate,
                  const void* gate_up, const void* down, int dtype) {
  using namespace em;
  Shape shape(bank_dtype, hidden, intermediate);
  uint32_t* to = (uint32_t*)bank + slot * shape.slot_words();
  bank_dtype == kFloat32
      ? fill<OneFloat>(to, shape, (const char*)gate_up, (const char*)down, dtype)
      : fill<PairBf16>(to, shape, (const char*)gate_up, (const char*)down, dtype);
}

// 0, or 1: a pair_row is out of range, 2: a pair_slot is. combine: 1 slots, 2 partial (float32).
int em_experts(const void* bank, int bank_dtype, int64_t slots, int64_t hidden, int64_t intermediate,
               const void* x, int x_dtype, int64_t rows, int64_t x_row_bytes,
               const int32_t* pair_row, const int32_t* pair_slot, const float* pair_weight,
               int64_t num_pairs, int combine, void* out, int out_dtype) {
  using namespace em;
  if (!within(pair_row, num_pairs, rows)) return 1;
  if (!within(pair_slot, num_pairs, slots)) return 2;
  if (intermediate == 0) {  // experts without a width give zeros
    std::memset(out, 0, (combine == 2 ? rows : num_pairs) * hidden * size_of(out_dtype));
    return 0;
  }
  Shape shape(bank_dtype, hidden, intermediate);
  Pairs pairs{pair_row, pair_slot, pair_weight, num_pairs};
  auto* words = (const uint32_t*)bank;
  auto* from = (const char*)x;
  bank_dtype == kFloat32
      ? forward<OneFloat>(words, slots, shape, from, x_dtype, rows, x_row_bytes, pairs, combine == 2, out, out_dtype)
      : forward<PairBf16>(words, slots, shape, from, x_dtype, rows, x_row_bytes, pairs, combine == 2, out, out_dtype);
  return 0;
}
}
