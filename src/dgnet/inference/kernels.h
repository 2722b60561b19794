// Convolutions in float32 on maps with channels last, with what follows them: bias, residual, activation, difference.
//
// Vectors are those of GCC and clang, so that the same source serves all processors.
// Letters: n samples, C channels, H and W height and width, k kernel size.

#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <new>
#include <utility>
#include <vector>

namespace dgnet {

// kWidth: floats of a vector. A tile of a product, kRows × (kVectors · kWidth), is held in registers.
#if defined(__AVX512F__)
constexpr int kWidth = 16, kRows = 8, kVectors = 3;
#elif defined(__AVX2__)
constexpr int kWidth = 8, kRows = 4, kVectors = 3;
#else
constexpr int kWidth = 4, kRows = 6, kVectors = 3;
#endif

// Whether the compiler can permute a vector's lanes (clang has another function for it).
#if defined(__GNUC__) && !defined(__clang__)
constexpr bool kCanShuffle = true;
#else
constexpr bool kCanShuffle = false;
#endif

constexpr int64_t kPositions = 64;           // outputs of a convolution of narrow groups that one task computes
constexpr int64_t kBlockBytes = 256 * 1024;  // of a product's left side, which is read once for each panel of the right side
constexpr int64_t kTaskWork = 256 * 1024;    // fewest multiply-adds for which another thread pays off

using Vector = float __attribute__((vector_size(4 * kWidth)));
using Mask = int32_t __attribute__((vector_size(4 * kWidth)));

inline Vector load(const float* from) {
  Vector value;
  std::memcpy(&value, from, sizeof(Vector));
  return value;
}

inline Vector load(const float* from, int64_t count) {
  if (count >= kWidth) return load(from);
  Vector value = {};
  std::memcpy(&value, from, count * sizeof(float));
  return value;
}

inline void store(float* to, Vector value, int64_t count) {
  if (count >= kWidth) {
    std::memcpy(to, &value, sizeof(Vector));
    return;
  }
  std::memcpy(to, &value, count * sizeof(float));
}

inline Vector shuffle(Vector value, Mask lanes) {
#if defined(__GNUC__) && !defined(__clang__)
  return __builtin_shuffle(value, lanes);
#else
  return value;
#endif
}

inline Vector fill(float value) { return value - Vector{}; }  // not a sum: that would be computed, because of -0
inline Vector least(Vector a, Vector b) { return b < a ? b : a; }  // a if either is NaN
inline Vector most(Vector a, Vector b) { return b > a ? b : a; }

// e^x, with a relative error of 2e-7. Outside ±87 it is that of ±87.
inline Vector exponential(Vector x) {
  x = least(most(x, fill(-87.0f)), fill(87.0f));
  const Vector shifted = x * 1.44269504f + 12582912.0f;  // 1.5 · 2^23: rounds to the nearest integer
  const Vector power = shifted - 12582912.0f;
  const Vector rest = x - power * 0.693359375f + power * 2.12194440e-4f;
  Vector y = fill(1.9875691500e-4f);
  y = y * rest + 1.3981999507e-3f;
  y = y * rest + 8.3334519073e-3f;
  y = y * rest + 4.1665795894e-2f;
  y = y * rest + 1.6666665459e-1f;
  y = y * rest + 5.0000001201e-1f;
  y = y * rest * rest + rest + 1.0f;
  const Mask scale = (__builtin_convertvector(power, Mask) + 127) << 23;
  Vector factor;
  std::memcpy(&factor, &scale, sizeof(Vector));
  return y * factor;
}

inline Vector logistic(Vector x) { return 1.0f / (1.0f + exponential(-x)); }

// The error function, with an absolute error of 2e-7 (Abramowitz and Stegun, 7.1.26).
inline Vector error_function(Vector x) {
  const Vector size = x < 0 ? -x : x;
  const Vector t = 1.0f / (1.0f + 0.3275911f * size);
  Vector y = fill(1.061405429f);
  y = y * t - 1.453152027f;
  y = y * t + 1.421413741f;
  y = y * t - 0.284496736f;
  y = y * t + 0.254829592f;
  y = 1.0f - y * t * exponential(-size * size);
  return x < 0 ? -y : y;
}

enum class Function { kNone, kClamp, kLeaky, kHardSwish, kHardSigmoid, kSigmoid, kSilu, kTanh, kGelu, kGeluTanh };

struct Activation {
  Function function = Function::kNone;
  float first = 0, second = 0;  // bounds of a clamp; slope of a leaky ReLU

  bool is_clamp() const { return function <= Function::kClamp; }
  float low() const { return function == Function::kNone ? -INFINITY : first; }
  float high() const { return function == Function::kNone ? INFINITY : second; }

  Vector operator()(Vector x) const {
    switch (function) {
      case Function::kNone:
        return x;
      case Function::kClamp:
        return least(most(x, fill(first)), fill(second));
      case Function::kLeaky:
        return x < 0 ? x * first : x;
      case Function::kHardSwish:
        return x * least(most(x + 3.0f, fill(0.0f)), fill(6.0f)) * (1.0f / 6);
      case Function::kHardSigmoid:
        return least(most(x + 3.0f, fill(0.0f)), fill(6.0f)) * (1.0f / 6);
      case Function::kSigmoid:
        return logistic(x);
      case Function::kSilu:
        return x * logistic(x);
      case Function::kTanh:
        return 2.0f * logistic(2.0f * x) - 1.0f;
      case Function::kGelu:
        return x * 0.5f * (1.0f + error_function(x * 0.70710678f));
      case Function::kGeluTanh:
        return x * logistic(1.5957691216f * (x + 0.044715f * x * x * x));
    }
    return x;
  }
};

// What follows a sum: act(sum + bias + added) - subtracted. `bias` is of the channel, the others are maps like the output.
struct Finish {
  const float* bias = nullptr;
  const float* added = nullptr;
  const float* subtracted = nullptr;
  Activation activation;

  // Whether nothing but a bias and bounds follow.
  bool is_clamp() const { return added == nullptr && subtracted == nullptr && activation.is_clamp(); }
  float low() const { return is_clamp() ? activation.low() : -INFINITY; }
  float high() const { return is_clamp() ? activation.high() : INFINITY; }

  Vector start(int64_t channel, int64_t count) const { return bias == nullptr ? Vector{} : load(bias + channel, count); }

  // Applies what follows to sums that were stored, `rows` × `count`.
  __attribute__((noinline)) void complete(float* out, int64_t rows, int64_t stride, int64_t at, int64_t count) const {
    for (int64_t row = 0; row < rows; ++row, at += stride) {
      for (int64_t c = 0; c < count; c += kWidth) {
        store(out + at + c, (*this)(load(out + at + c, count - c), at + c, count - c), count - c);
      }
    }
  }

  // From sums that started with the bias. `at`: the place in the maps; `count`: of elements.
  Vector operator()(Vector sum, int64_t at, int64_t count) const {
    if (added != nullptr) sum += load(added + at, count);
    sum = activation(sum);
    return subtracted == nullptr ? sum : sum - load(subtracted + at, count);
  }
};

// Memory that starts at a cache line: a vector that lies in two of them takes twice as long to load.
template <typename T>
struct AlignedAllocator {
  using value_type = T;
  static constexpr std::align_val_t kLine{64};
  AlignedAllocator() = default;
  template <typename U>
  AlignedAllocator(const AlignedAllocator<U>&) {}
  T* allocate(size_t count) { return static_cast<T*>(::operator new(count * sizeof(T), kLine)); }
  void deallocate(T* at, size_t) { ::operator delete(at, kLine); }
  bool operator==(const AlignedAllocator&) const { return true; }
};

using Floats = std::vector<float, AlignedAllocator<float>>;

struct Shape {  // of one convolution
  int64_t kernel[2], stride[2], dilation[2];
  int64_t padding[2];  // above and left
  int64_t in_size[2], out_size[2];

  int64_t taps() const { return kernel[0] * kernel[1]; }
  int64_t out_area() const { return out_size[0] * out_size[1]; }
  bool is_pointwise() const {
    return taps() == 1 && stride[0] == 1 && stride[1] == 1 && padding[0] == 0 && padding[1] == 0;
  }
};

// Goes through the outputs of a convolution and finds the input pixels of each.
class Cursor {
 public:
  Cursor(const Shape& shape, const float* in, const float* zeros, int64_t channels, int64_t position)
      : shape(shape), in(in), zeros(zeros), channels(channels), sample(position / shape.out_area()),
        y(position % shape.out_area() / shape.out_size[1]), x(position % shape.out_size[1]) {}

  // The pixels of the next `count` outputs, `pixels`[tap · count + output]; `offset`: of the first channel.
  void find(const float** pixels, int64_t count, int64_t offset) {
    for (int64_t n = 0; n < count; ++n) {
      const float* map = in + sample * shape.in_size[0] * shape.in_size[1] * channels + offset;
      const int64_t top = y * shape.stride[0] - shape.padding[0], left = x * shape.stride[1] - shape.padding[1];
      for (int64_t i = 0, tap = 0; i < shape.kernel[0]; ++i) {
        const int64_t row = top + i * shape.dilation[0];
        const bool is_row = row >= 0 && row < shape.in_size[0];
        const float* pixel = map + (row * shape.in_size[1] + left) * channels;
        int64_t column = left;
        for (int64_t j = 0; j < shape.kernel[1]; ++j, ++tap) {
          pixels[tap * count + n] = is_row && column >= 0 && column < shape.in_size[1] ? pixel : zeros;
          column += shape.dilation[1];
          pixel += shape.dilation[1] * channels;
        }
      }
      if (++x == shape.out_size[1]) {
        x = 0;
        if (++y == shape.out_size[0]) y = 0, ++sample;
      }
    }
  }

 private:
  const Shape& shape;
  const float *in, *zeros;
  const int64_t channels;
  int64_t sample, y, x;
};

// The weights of a convolution in the order in which they are read.
// Full and grouped: for each group panels of up to kVectors · kWidth output channels, of each (taps, input channels, width).
// Narrow groups: for each kWidth output channels (taps, input channels of a group, kWidth). Depthwise: (taps, C).
struct Packed {
  Floats values;
  Floats zeros;  // a pixel of the padding
  int64_t in_channels, out_channels, groups, taps;
  std::vector<int64_t> firsts;  // first output channel of each panel in its group, and the end, a multiple of kWidth

  // Whether a vector holds the channels of several groups, each of as many inputs as outputs.
  bool is_narrow() const {
    const int64_t size = group_out();
    return kCanShuffle && groups > 1 && group_in() == size && (size == 8 || size == 4) && size < kWidth;
  }

  bool is_depthwise() const { return groups == in_channels && groups == out_channels && groups > 1; }
  int64_t group_in() const { return in_channels / groups; }
  int64_t group_out() const { return out_channels / groups; }
  int64_t panels() const { return static_cast<int64_t>(firsts.size()) - 1; }
  int64_t width(int64_t panel) const { return firsts[panel + 1] - firsts[panel]; }

  const float* weights(int64_t group, int64_t panel) const {
    return values.data() + (group * firsts.back() + firsts[panel]) * taps * group_in();
  }

  // `weight`: (out_channels, in_channels / groups, taps), contiguous.
  Packed(const float* weight, int64_t in_channels, int64_t out_channels, int64_t groups, int64_t taps)
      : zeros(in_channels + kWidth, 0.0f), in_channels(in_channels), out_channels(out_channels), groups(groups), taps(taps) {
    if (is_depthwise()) {
      values.resize(taps * out_channels);
      for (int64_t c = 0; c < out_channels; ++c) {
        for (int64_t tap = 0; tap < taps; ++tap) values[tap * out_channels + c] = weight[c * taps + tap];
      }
      return;
    }
    if (is_narrow()) {
      const int64_t padded = (out_channels + kWidth - 1) / kWidth * kWidth;
      values.assign(padded * taps * group_in(), 0.0f);
      for (int64_t c = 0; c < out_channels; ++c) {
        for (int64_t tap = 0; tap < taps; ++tap) {
          for (int64_t k = 0; k < group_in(); ++k) {
            values[((c / kWidth * taps + tap) * group_in() + k) * kWidth + c % kWidth] = weight[(c * group_in() + k) * taps + tap];
          }
        }
      }
      return;
    }
    const int64_t vectors = (group_out() + kWidth - 1) / kWidth, count = (vectors + kVectors - 1) / kVectors;
    for (int64_t panel = 0; panel <= count; ++panel) firsts.push_back(vectors * panel / count * kWidth);  // of similar width
    values.reserve(groups * firsts.back() * taps * group_in());
    for (int64_t group = 0; group < groups; ++group) {
      for (int64_t panel = 0; panel < count; ++panel) {
        for (int64_t tap = 0; tap < taps; ++tap) {
          for (int64_t c = 0; c < group_in(); ++c) {
            for (int64_t out = firsts[panel]; out < firsts[panel + 1]; ++out) {
              values.push_back(out < group_out() ? weight[((group * group_out() + out) * group_in() + c) * taps + tap] : 0);
            }
          }
        }
      }
    }
  }
};

// One tile of a product: `Rows` positions × `Vectors` · kWidth channels. `rows`: for each tap and position, its input channels.
template <int Rows, int Vectors>
void multiply_tile(const float* const* rows, int64_t taps, int64_t depth, const float* weights, float* out, int64_t stride,
                   int64_t at, int64_t channel, int64_t count, const Finish& finish) {
  Vector sums[Rows][Vectors];
#pragma GCC unroll 4
  for (int v = 0; v < Vectors; ++v) {
    const Vector start = finish.start(channel + v * kWidth, count - v * kWidth);
#pragma GCC unroll 8
    for (int row = 0; row < Rows; ++row) sums[row][v] = start;
  }
  for (int row = 0; row < Rows; ++row) {  // they are written soon
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v) __builtin_prefetch(out + at + row * stride + v * kWidth, 1);
  }
  for (int64_t tap = 0; tap < taps; ++tap) {
    const float* from[Rows];
#pragma GCC unroll 8
    for (int row = 0; row < Rows; ++row) from[row] = rows[tap * Rows + row];
    for (int64_t k = 0; k < depth; ++k, weights += Vectors * kWidth) {
      Vector right[Vectors];
#pragma GCC unroll 4
      for (int v = 0; v < Vectors; ++v) right[v] = load(weights + v * kWidth);
#pragma GCC unroll 8
      for (int row = 0; row < Rows; ++row) {
        const Vector left = fill(from[row][k]);
#pragma GCC unroll 4
        for (int v = 0; v < Vectors; ++v) sums[row][v] += left * right[v];
      }
    }
  }
  const Vector low = fill(finish.low()), high = fill(finish.high());
#pragma GCC unroll 8
  for (int row = 0; row < Rows; ++row) {
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v) {
      store(out + at + row * stride + v * kWidth, least(most(sums[row][v], low), high), count - v * kWidth);
    }
  }
  if (!finish.is_clamp()) finish.complete(out, Rows, stride, at, count);  // called once nothing is held in registers
}

using Tile = void (*)(const float* const*, int64_t, int64_t, const float*, float*, int64_t, int64_t, int64_t, int64_t,
                      const Finish&);

template <int Vectors>
Tile find_tile(int64_t rows) {
  static_assert(kRows <= 8);
  switch (rows) {
    case 1: return multiply_tile<1, Vectors>;
    case 2: return multiply_tile<2, Vectors>;
    case 3: return multiply_tile<3, Vectors>;
    case 4: return multiply_tile<4, Vectors>;
#if defined(__AVX512F__) || !defined(__AVX2__)
    case 5: return multiply_tile<5, Vectors>;
    case 6: return multiply_tile<6, Vectors>;
#endif
#if defined(__AVX512F__)
    case 7: return multiply_tile<7, Vectors>;
    case 8: return multiply_tile<8, Vectors>;
#endif
  }
  return nullptr;
}

inline Tile find_tile(int64_t rows, int64_t vectors) {
  return vectors == 1 ? find_tile<1>(rows) : vectors == 2 ? find_tile<2>(rows) : find_tile<3>(rows);
}

// The positions `begin` to `end` of the channels of one panel.
inline void multiply(const float* in, float* out, const Packed& packed, const Shape& shape, int64_t group, int64_t panel,
                     int64_t begin, int64_t end, const Finish& finish) {
  const int64_t depth = packed.group_in(), taps = packed.taps, vectors = packed.width(panel) / kWidth;
  const int64_t count = std::min(packed.group_out() - packed.firsts[panel], packed.width(panel));
  const int64_t channel = group * packed.group_out() + packed.firsts[panel];
  const float* const weights = packed.weights(group, panel);
  const bool is_pointwise = shape.is_pointwise();
  std::vector<const float*> rows(taps * kRows);
  Cursor cursor(shape, in, packed.zeros.data(), packed.in_channels, begin);
  for (int64_t position = begin; position < end; position += kRows) {
    const int64_t height = std::min<int64_t>(kRows, end - position);
    if (is_pointwise) {
      for (int64_t row = 0; row < height; ++row) rows[row] = in + (position + row) * packed.in_channels + group * depth;
    } else {
      cursor.find(rows.data(), height, group * depth);
    }
    find_tile(height, vectors)(rows.data(), taps, depth, weights, out, packed.out_channels,
                               position * packed.out_channels + channel, channel, count, finish);
  }
}

// `Rows` positions of kWidth channels, which are groups of `Size`. `rows`: for each tap and position, its input channels.
template <int Rows, int Size>
void multiply_groups(const float* const* rows, int64_t taps, const float* weights, float* out, int64_t stride, int64_t at,
                     int64_t channel, int64_t count, const Finish& finish) {
  Mask lanes[Size];  // the k-th input of each lane's group
  for (int k = 0; k < Size; ++k) {
    for (int lane = 0; lane < kWidth; ++lane) lanes[k][lane] = lane / Size * Size + k;
  }
  Vector sums[Rows];
#pragma GCC unroll 8
  for (int row = 0; row < Rows; ++row) sums[row] = finish.start(channel, count);
  for (int64_t tap = 0; tap < taps; ++tap) {
    Vector in[Rows];
#pragma GCC unroll 8
    for (int row = 0; row < Rows; ++row) in[row] = load(rows[tap * Rows + row] + channel, count);
#pragma GCC unroll 8
    for (int k = 0; k < Size; ++k, weights += kWidth) {
      const Vector weight = load(weights);
#pragma GCC unroll 8
      for (int row = 0; row < Rows; ++row) sums[row] += shuffle(in[row], lanes[k]) * weight;
    }
  }
  const Vector low = fill(finish.low()), high = fill(finish.high());
#pragma GCC unroll 8
  for (int row = 0; row < Rows; ++row) store(out + at + row * stride, least(most(sums[row], low), high), count);
  if (!finish.is_clamp()) finish.complete(out, Rows, stride, at, count);
}

// The positions `begin` to `end` of a convolution of narrow groups.
inline void multiply_narrow(const float* in, float* out, const Packed& packed, const Shape& shape, int64_t begin, int64_t end,
                            const Finish& finish) {
  constexpr int kTile = 8;
  const int64_t taps = packed.taps, channels = packed.out_channels, size = packed.group_in();
  std::vector<const float*> rows(taps * (end - begin));  // of each tile
  Cursor cursor(shape, in, packed.zeros.data(), channels, begin);
  for (int64_t position = begin; position < end;) {
    const int64_t height = end - position >= kTile ? kTile : 1;
    cursor.find(rows.data() + taps * (position - begin), height, 0);
    position += height;
  }
  for (int64_t channel = 0; channel < channels; channel += kWidth) {
    const float* const weights = packed.values.data() + channel * taps * size;
    for (int64_t position = begin; position < end;) {
      const int64_t height = end - position >= kTile ? kTile : 1;
      const auto run = height == kTile ? (size == 8 ? multiply_groups<kTile, 8> : multiply_groups<kTile, 4>)
                                       : (size == 8 ? multiply_groups<1, 8> : multiply_groups<1, 4>);
      run(rows.data() + taps * (position - begin), taps, weights, out, channels, position * channels + channel, channel,
          channels - channel, finish);
      position += height;
    }
  }
}

// `Pixels` outputs of one row of a depthwise convolution. `pixels`: for each row of the kernel, the inputs of the outputs.
template <int Kernel, int Stride, int Pixels>
void slide_row(const float* const* pixels, const float* weights, int64_t channels, float* out, int64_t at,
               const Finish& finish) {
  constexpr int kColumns = (Pixels - 1) * Stride + Kernel;
  const Vector low = fill(finish.low()), high = fill(finish.high());
  for (int64_t channel = 0; channel + kWidth <= channels; channel += kWidth) {
    const Vector start = finish.start(channel, kWidth);
    Vector sums[Pixels];
#pragma GCC unroll 8
    for (int p = 0; p < Pixels; ++p) sums[p] = start;
    for (int i = 0; i < Kernel; ++i) {
      Vector weight[Kernel];
#pragma GCC unroll 8
      for (int j = 0; j < Kernel; ++j) weight[j] = load(weights + (i * Kernel + j) * channels + channel);
#pragma GCC unroll 16
      for (int c = 0; c < kColumns; ++c) {
        const Vector value = load(pixels[i * kColumns + c] + channel);
#pragma GCC unroll 8
        for (int p = 0; p < Pixels; ++p) {
          if (c - p * Stride >= 0 && c - p * Stride < Kernel) sums[p] += value * weight[c - p * Stride];
        }
      }
    }
#pragma GCC unroll 8
    for (int p = 0; p < Pixels; ++p) {
      store(out + at + p * channels + channel, least(most(sums[p], low), high), kWidth);
    }
  }
  if (!finish.is_clamp()) finish.complete(out, Pixels, channels, at, channels / kWidth * kWidth);
}

using Row = void (*)(const float* const*, const float*, int64_t, float*, int64_t, const Finish&);

inline Row find_row(int64_t kernel, int64_t stride) {
  if (stride == 1) return kernel == 3 ? slide_row<3, 1, 4> : kernel == 5 ? slide_row<5, 1, 4> : slide_row<7, 1, 4>;
  return kernel == 3 ? slide_row<3, 2, 4> : kernel == 5 ? slide_row<5, 2, 4> : slide_row<7, 2, 4>;
}

// One output of a depthwise convolution, the channels from `first` on, over the taps that do not lie in the padding.
inline void slide_one(const std::vector<std::pair<const float*, const float*>>& taps, int64_t first, int64_t channels, float* out,
                      int64_t at, const Finish& finish) {
  constexpr int kBlock = 4;
  const Vector low = fill(finish.low()), high = fill(finish.high());
  int64_t channel = first;
  for (; channel + kBlock * kWidth <= channels; channel += kBlock * kWidth) {
    Vector sums[kBlock];
#pragma GCC unroll 4
    for (int v = 0; v < kBlock; ++v) sums[v] = finish.start(channel + v * kWidth, kWidth);
    for (const auto& [pixel, weights] : taps) {
#pragma GCC unroll 4
      for (int v = 0; v < kBlock; ++v) sums[v] += load(pixel + channel + v * kWidth) * load(weights + channel + v * kWidth);
    }
#pragma GCC unroll 4
    for (int v = 0; v < kBlock; ++v) {
      const int64_t place = at + channel + v * kWidth;
      store(out + place, least(most(sums[v], low), high), kWidth);
    }
  }
  for (; channel < channels; channel += kWidth) {
    const int64_t count = channels - channel;
    Vector sum = finish.start(channel, count);
    for (const auto& [pixel, weights] : taps) sum += load(pixel + channel, count) * load(weights + channel, count);
    store(out + at + channel, least(most(sum, low), high), count);
  }
  if (!finish.is_clamp()) finish.complete(out, 1, channels, at + first, channels - first);
}

// The output rows `begin` to `end`, of all samples, of a depthwise convolution.
inline void slide(const float* in, float* out, const Packed& packed, const Shape& shape, int64_t begin, int64_t end,
                  const Finish& finish) {
  constexpr int64_t kPixels = 4;
  const int64_t channels = packed.out_channels, kernel = shape.kernel[1], stride = shape.stride[1], width = shape.out_size[1];
  const bool is_row = shape.kernel[0] == kernel && (kernel == 3 || kernel == 5 || kernel == 7) && stride <= 2 &&
                      shape.dilation[0] == 1 && shape.dilation[1] == 1;
  const int64_t whole = is_row ? width / kPixels * kPixels : 0;  // pixels of a row that are computed together
  const int64_t done = channels / kWidth * kWidth;               // channels that `slide_row` computes
  const int64_t columns = (kPixels - 1) * stride + kernel;
  std::vector<const float*> pixels(kernel * columns);
  std::vector<std::pair<const float*, const float*>> taps;
  for (int64_t row = begin; row < end; ++row) {
    const int64_t sample = row / shape.out_size[0], y = row % shape.out_size[0];
    const float* const map = in + sample * shape.in_size[0] * shape.in_size[1] * channels;
    const int64_t top = y * shape.stride[0] - shape.padding[0];
    for (int64_t x = 0; x < whole; x += kPixels) {
      const int64_t left = x * stride - shape.padding[1];
      for (int64_t i = 0; i < kernel; ++i) {
        const bool is_in = top + i >= 0 && top + i < shape.in_size[0];
        const float* from = map + ((top + i) * shape.in_size[1] + left) * channels;
        for (int64_t c = 0; c < columns; ++c, from += channels) {
          const bool is_pixel = is_in && left + c >= 0 && left + c < shape.in_size[1];
          pixels[i * columns + c] = is_pixel ? from : packed.zeros.data();
        }
      }
      find_row(kernel, stride)(pixels.data(), packed.values.data(), channels, out, (row * width + x) * channels, finish);
    }
    for (int64_t x = done < channels ? 0 : whole; x < width; ++x) {
      const int64_t left = x * stride - shape.padding[1];
      taps.clear();
      for (int64_t i = 0; i < shape.kernel[0]; ++i) {
        const int64_t from = top + i * shape.dilation[0];
        if (from < 0 || from >= shape.in_size[0]) continue;
        for (int64_t j = 0; j < kernel; ++j) {
          const int64_t column = left + j * shape.dilation[1];
          if (column < 0 || column >= shape.in_size[1]) continue;
          taps.emplace_back(map + (from * shape.in_size[1] + column) * channels,
                            packed.values.data() + (i * kernel + j) * channels);
        }
      }
      slide_one(taps, x < whole ? done : 0, channels, out, (row * width + x) * channels, finish);
    }
  }
}

// A convolution of maps, (samples, H, W, C) in memory -> out.
inline void convolve(const float* in, float* out, const Packed& packed, const Shape& shape, int64_t samples,
                     const Finish& finish) {
  const int64_t positions = samples * shape.out_area();
  if (packed.is_depthwise()) {
    const int64_t work = packed.taps * packed.out_channels * shape.out_size[1];
    at::parallel_for(0, samples * shape.out_size[0], std::max<int64_t>(kTaskWork / 4 / work, 1),
                     [&](int64_t begin, int64_t end) { slide(in, out, packed, shape, begin, end, finish); });
    return;
  }
  if (packed.is_narrow()) {
    const int64_t work = kPositions * packed.taps * packed.group_in() * packed.out_channels;
    at::parallel_for(0, (positions + kPositions - 1) / kPositions, std::max<int64_t>(kTaskWork / work, 1),
                     [&](int64_t begin, int64_t end) {
                       for (int64_t task = begin; task < end; ++task) {
                         multiply_narrow(in, out, packed, shape, task * kPositions, std::min((task + 1) * kPositions, positions),
                                         finish);
                       }
                     });
    return;
  }
  // A task is some positions of one panel.
  const int64_t depth = packed.group_in() * packed.taps, panels = packed.panels() * packed.groups;
  const int64_t block = std::max<int64_t>(kBlockBytes / 4 / (packed.group_in() * kRows), 1) * kRows;
  const int64_t share = (positions + at::get_num_threads() - 1) / at::get_num_threads();
  const int64_t rows = std::max<int64_t>(std::min(block, (share + kRows - 1) / kRows * kRows), kRows);
  const int64_t blocks = (positions + rows - 1) / rows;
  const int64_t work = std::min(rows, positions) * depth * packed.group_out() / packed.panels();
  at::parallel_for(0, blocks * panels, std::max<int64_t>(kTaskWork / std::max<int64_t>(work, 1), 1), [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t start = task / panels * rows, panel = task % panels;
      multiply(in, out, packed, shape, panel / packed.panels(), panel % packed.panels(), start,
               std::min(start + rows, positions), finish);
    }
  });
}

}  // namespace dgnet
