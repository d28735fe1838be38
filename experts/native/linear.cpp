// y = x W^T for a packed W: packing, and the product parallel over panels and blocks of rows.
#include "entry.h"
#include "pack.h"
#include "pool.h"

namespace em {
namespace {

constexpr int64_t kTaskWords = 24 << 10;  // 96 KiB of weights: some 4 us of memory reads a task
constexpr int64_t kTaskRows = 480;

template <class D>
void pack(uint32_t* to, const char* weight, int dtype, int64_t n, int64_t k, int64_t row_bytes) {
  Region region;
  int64_t steps = num_steps<D>(k);
  region.run(num_panels(n), [&](int64_t p) {
    pack_panel<D>(to + p * kPanel * steps, panel_width(n, p), k, dtype, [&](int c) {
      int64_t row = p * kPanel + c;
      return row < n ? weight + row * row_bytes : nullptr;
    });
  });
}

template <class Y>
void write_rows(Y* y, int64_t stride, const float* sums, int rows, int64_t columns) {
  for (int m = 0; m < rows; m++) {
    for_vectors(columns, [&](int64_t i, int n) {
      store_up_to(y + m * stride + i, load(sums + m * kPanel + i), n);
    });
  }
}

template <class D>
void linear(const uint32_t* w, int64_t n, int64_t k, const char* x, int x_dtype, int64_t m,
            int64_t x_row_bytes, char* y, int y_dtype, int64_t y_row_elements) {
  Region region;
  int64_t steps = num_steps<D>(k), panels = num_panels(n);
  bool direct = size_of(x_dtype) * D::K == 4 && k % D::K == 0;
  auto** rows = region.scratch<const uint32_t*>(m);
  uint32_t* packed = direct ? nullptr : region.scratch<uint32_t>(m * steps);
  for (int64_t i = 0; i < m; i++) {
    rows[i] = direct ? (const uint32_t*)(x + i * x_row_bytes) : packed + i * steps;
  }
  if (!direct) {
    int64_t some = std::max<int64_t>(1, 16384 / steps);
    region.run((m + some - 1) / some, [&](int64_t t) {
      for (int64_t i = t * some; i < std::min(m, (t + 1) * some); i++) {
        pack_row<D>(packed + i * steps, x + i * x_row_bytes, x_dtype, k);
      }
    });
  }
  // Several panels a task where rows are few, several blocks of rows where they are many.
  int64_t fair = std::max<int64_t>(1, panels / (region.threads() * 4));
  int64_t group = m > kTileRows ? 1 : std::clamp<int64_t>(kTaskWords / (steps * kPanel), 1, fair);
  int64_t groups = (panels + group - 1) / group;
  int64_t block = std::clamp<int64_t>(round_up(m * groups / (region.threads() * 8) + 1, kTileRows),
                                      std::min<int64_t>(kRowBlock, kTaskRows), kTaskRows);
  int64_t blocks = (m + block - 1) / block;
  region.run(groups * blocks, [&](int64_t task) {
    alignas(64) float sums[kRowBlock * kPanel];
    int64_t p0 = task % groups * group, first = task / groups * block;
    int64_t last = std::min(m, first + block);
    for (int64_t p = p0; p < std::min(panels, p0 + group); p++) {
      const uint32_t* panel = w + p * kPanel * steps;
      int width = panel_width(n, p);
      int64_t columns = std::min<int64_t>(kPanel, n - p * kPanel);
      for (int64_t i = first; i < last; i += kRowBlock) {
        int count = int(std::min<int64_t>(kRowBlock, last - i));
        multiply_panel<D>(panel, width, steps, rows + i, count, sums);
        int64_t at = i * y_row_elements + p * kPanel;
        if (y_dtype == kFloat32) {
          write_rows((float*)y + at, y_row_elements, sums, count, columns);
        } else {
          write_rows((bf16*)y + at, y_row_elements, sums, count, columns);
        }
      }
    }
  });
}

}  // namespace
}  // namespace em

extern "C" {

int64_t em_packed_bytes(int64_t n, int64_t k, int dtype) {
  using namespace em;
  return 4 * packed_words(n, dtype == kFloat32 ? num_steps<OneFloat>(k) : num_steps<PairBf16>(k));
}

void em_pack(void* to, int packed_dtype, const void* weight, int dtype, int64_t n, int64_t k,
             int64_t row_bytes) {
  using namespace em;
  auto* words = (uint32_t*)to;
  auto* from = (const char*)weight;
  packed_dtype == kFloat32 ? pack<OneFloat>(words, from, dtype, n, k, row_bytes)
                           : pack<PairBf16>(words, from, dtype, n, k, row_bytes);
}

void em_linear(const void* w, int w_dtype, int64_t n, int64_t k, const void* x, int x_dtype,
               int64_t m, int64_t x_row_bytes, void* y, int y_dtype, int64_t y_row_elements) {
  using namespace em;
  auto* words = (const uint32_t*)w;
  auto* from = (const char*)x;
  auto* to = (char*)y;
  w_dtype == kFloat32
      ? linear<OneFloat>(words, n, k, from, x_dtype, m, x_row_bytes, to, y_dtype, y_row_elements)
      : linear<PairBf16>(words, n, k, from, x_dtype, m, x_row_bytes, to, y_dtype, y_row_elements);
}
}
