// A node's input x̂_j = Σ_i α_ij x_i (Eq. 3) and its gradients on the CPU: the kernels of `dgnet::aggregate`, of
// `dgnet::weight_gradients`, and of `dgnet::partial_sums`, several sums at once.
//
// dgnet.graph._aggregate defines the operators and what they return; the tests compare with its plain loop.
// A sum is computed in chunks that stay in the level 1 cache, so each map is read once and each result is written once.
// Letters: B samples, E in-edges, g groups of channels. S is the type of sums, T that of a map's elements.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/empty_strided.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <numeric>
#include <optional>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

using at::BFloat16;
using at::Half;
using at::ScalarType;
using at::Tensor;

constexpr int64_t kChunk = 4096;   // elements of a sum that are computed together
constexpr int64_t kPartial = 512;  // elements of each feature that become partial sums together
constexpr int64_t kWork = 32768;   // fewest elements of maps for which another thread pays off
constexpr int64_t kAhead = 4096;   // bytes from what is read to what is asked for
constexpr int kEdges = 4;          // edges that are added in one pass over a chunk

// Vectors are those of GCC and clang. They have the same lanes on all processors, so that sums do not depend on a processor's width.
typedef float Floats __attribute__((vector_size(64)));
typedef double Doubles __attribute__((vector_size(64)));
typedef uint32_t Words __attribute__((vector_size(64)));
typedef uint16_t Shorts __attribute__((vector_size(32)));

template <class S>
using Vector = std::conditional_t<std::is_same_v<S, double>, Doubles, Floats>;
template <class S>
constexpr int64_t kLanes = 64 / sizeof(S);
template <class S>
constexpr ScalarType kSums = std::is_same_v<S, double> ? at::kDouble : at::kFloat;

inline Floats load(const float* from) {
  Floats value;
  std::memcpy(&value, from, sizeof(value));
  return value;
}

inline Doubles load(const double* from) {
  Doubles value;
  std::memcpy(&value, from, sizeof(value));
  return value;
}

inline void store(float* to, Floats value) { std::memcpy(to, &value, sizeof(value)); }
inline void store(double* to, Doubles value) { std::memcpy(to, &value, sizeof(value)); }

// Sixteen 16-bit numbers to 32 bits, and back. GCC finds longer code for it.
inline Words widen(const void* from) {
#if defined(__AVX512F__)
  return reinterpret_cast<Words>(_mm512_cvtepu16_epi32(_mm256_loadu_si256(static_cast<const __m256i*>(from))));
#elif defined(__AVX2__)
  const auto* const parts = static_cast<const __m128i*>(from);
  const __m256i wide[2] = {_mm256_cvtepu16_epi32(_mm_loadu_si128(parts)), _mm256_cvtepu16_epi32(_mm_loadu_si128(parts + 1))};
  Words words;
  std::memcpy(&words, wide, sizeof(words));
  return words;
#else
  Shorts shorts;
  std::memcpy(&shorts, from, sizeof(shorts));
  return __builtin_convertvector(shorts, Words);
#endif
}

inline void narrow(void* to, Words words) {
#if defined(__AVX2__) && !defined(__AVX512F__)
  __m256i wide[2];
  std::memcpy(wide, &words, sizeof(words));
  const __m256i packed = _mm256_packus_epi32(wide[0], wide[1]);  // in the order 0 2 1 3
  _mm256_storeu_si256(static_cast<__m256i*>(to), _mm256_permute4x64_epi64(packed, 0b11011000));
#else
  const Shorts shorts = __builtin_convertvector(words, Shorts);
  std::memcpy(to, &shorts, sizeof(shorts));
#endif
}

inline Floats load(const BFloat16* from) { return reinterpret_cast<Floats>(widen(from) << 16); }

inline void store(BFloat16* to, Floats value) {
  Words bits = reinterpret_cast<Words>(value);
  bits = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;  // to the nearest, ties to even
  narrow(to, value == value ? bits : Words{} + 0x7fc0);
}

inline Floats load(const Half* from) {
#if defined(__AVX512F__)
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
#elif defined(__F16C__)
  const auto* const parts = reinterpret_cast<const __m128i*>(from);
  const __m256 wide[2] = {_mm256_cvtph_ps(_mm_loadu_si128(parts)), _mm256_cvtph_ps(_mm_loadu_si128(parts + 1))};
  Floats value;
  std::memcpy(&value, wide, sizeof(value));
  return value;
#else
  Floats value;
  for (int lane = 0; lane < 16; ++lane) value[lane] = static_cast<float>(from[lane]);
  return value;
#endif
}

inline void store(Half* to, Floats value) {
#if defined(__AVX512F__)
  const __m256i bits = _mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  std::memcpy(to, &bits, sizeof(bits));
#elif defined(__F16C__)
  __m256 wide[2];
  std::memcpy(wide, &value, sizeof(value));
  for (int half = 0; half < 2; ++half) {
    const __m128i bits = _mm256_cvtps_ph(wide[half], _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    std::memcpy(to + 8 * half, &bits, sizeof(bits));
  }
#else
  for (int lane = 0; lane < 16; ++lane) to[lane] = static_cast<Half>(value[lane]);
#endif
}

// Ask for what will be read soon. A pass over several maps goes from one to the next every few pages, and the processor's own
// prefetching begins anew each time: without this, five maps of 51 MB were read at 22 instead of 26 GB/s, six of 26 MB at 25
// instead of 36.
inline void fetch_ahead(const void* from) { __builtin_prefetch(static_cast<const char*>(from) + kAhead, 0, 2); }

// The first `count` elements, then zeros.
template <class S, class T>
inline Vector<S> load_some(const T* from, int64_t count) {
  if (count >= kLanes<S>) return load(from);
  T part[kLanes<S>] = {};
  std::memcpy(static_cast<void*>(part), from, count * sizeof(T));
  return load(part);
}

template <class S, class T>
inline void store_some(T* to, Vector<S> value, int64_t count) {
  if (count >= kLanes<S>) return store(to, value);
  T part[kLanes<S>];
  store(part, value);
  std::memcpy(static_cast<void*>(to), part, count * sizeof(T));
}

template <class S>
double add_lanes(Vector<S> value) {
  double total = 0;
  for (int64_t lane = 0; lane < kLanes<S>; ++lane) total += value[lane];
  return total;
}

// Call `run(T{})` with the type of a map's elements.
template <class S, class Run>
void with_type(ScalarType type, const Run& run) {
  if constexpr (std::is_same_v<S, double>) {
    run(double{});
  } else {
    if (type == at::kFloat) return run(float{});
    if (type == at::kBFloat16) return run(BFloat16{});
    run(Half{});
  }
}

// An open edge where one sample is summed: its map, and its weight: one, or, if `weights` is set, one for each element of a row.
template <class S>
struct Term {
  const char* values;
  ScalarType type;
  S weight;
  const S* weights;
};

// sum[k] (+)= Σ weight · values[k] over N terms of one type, for the elements `begin` to `begin + size` of the map.
template <class S, class T, int N, bool kEach>
void add_terms(S* sum, const Term<S>* terms, int64_t begin, int64_t size, bool starts) {
  const T* from[N];
  for (int n = 0; n < N; ++n) from[n] = reinterpret_cast<const T*>(terms[n].values) + begin;
  for (int64_t k = 0; k < size; k += kLanes<S>) {
    Vector<S> total = starts ? Vector<S>{} : load(sum + k);
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) {
      fetch_ahead(from[n] + k);
      const Vector<S> values = load_some<S>(from[n] + k, size - k);
      if constexpr (kEach) {
        total += load_some<S>(terms[n].weights + k, size - k) * values;
      } else {
        total += terms[n].weight * values;
      }
    }
    store(sum + k, total);
  }
}

template <class S, class T, bool kEach>
void add_terms(S* sum, const Term<S>* terms, int count, int64_t begin, int64_t size, bool starts) {
  static_assert(kEdges == 4);
  switch (count) {
    case 1: return add_terms<S, T, 1, kEach>(sum, terms, begin, size, starts);
    case 2: return add_terms<S, T, 2, kEach>(sum, terms, begin, size, starts);
    case 3: return add_terms<S, T, 3, kEach>(sum, terms, begin, size, starts);
    default: return add_terms<S, T, 4, kEach>(sum, terms, begin, size, starts);
  }
}

// The elements `begin` to `begin + size` of one sum, at most kChunk of them. `sum`: space for them.
template <class S, bool kEach>
void sum_chunk(S* sum, const std::vector<Term<S>>& terms, char* out, ScalarType type, int64_t begin, int64_t size) {
  if (terms.empty()) std::fill(sum, sum + size, S{0});
  for (size_t first = 0; first < terms.size();) {
    size_t end = first + 1;
    while (end < terms.size() && end - first < kEdges && terms[end].type == terms[first].type) ++end;
    with_type<S>(terms[first].type, [&](auto element) {
      add_terms<S, decltype(element), kEach>(sum, terms.data() + first, static_cast<int>(end - first), begin, size, first == 0);
    });
    first = end;
  }
  with_type<S>(type, [&](auto element) {
    auto* const to = reinterpret_cast<decltype(element)*>(out) + begin;
    for (int64_t k = 0; k < size; k += kLanes<S>) store_some<S>(to + k, load(sum + k), size - k);
  });
}

// The elements `begin` to `begin + size` of a map as numbers of type S, in whole vectors: `to` has space for the last one.
template <class S>
void read_chunk(S* to, const char* map, ScalarType type, int64_t begin, int64_t size) {
  with_type<S>(type, [&](auto element) {
    const auto* const from = reinterpret_cast<const decltype(element)*>(map) + begin;
    for (int64_t k = 0; k < size; k += kLanes<S>) {
      fetch_ahead(from + k);
      store(to + k, load_some<S>(from + k, size - k));
    }
  });
}

// The gradients of one edge from a chunk of the sum's gradient: `to` = weight · grad, and the return value Σ grad · values.
// With a weight for each element, grad · values is added to `products` instead. Null: not needed.
template <class S, class T, bool kDot, bool kWrite, bool kEach>
double pass_back(const S* grad, const T* values, T* to, S weight, const S* weights, S* products, int64_t size) {
  Vector<S> totals[2] = {};
  for (int64_t k = 0; k < size; k += 2 * kLanes<S>) {
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      const int64_t at = k + half * kLanes<S>, count = size - at;
      if (count <= 0) break;
      const Vector<S> g = load(grad + at);
      if constexpr (kDot) {
        fetch_ahead(values + at);
        const Vector<S> product = g * load_some<S>(values + at, count);
        if constexpr (kEach) {
          store_some<S>(products + at, load_some<S>(products + at, count) + product, count);
        } else {
          totals[half] += product;
        }
      }
      if constexpr (kWrite && kEach) store_some<S>(to + at, g * load_some<S>(weights + at, count), count);
      if constexpr (kWrite && !kEach) store_some<S>(to + at, g * weight, count);
    }
  }
  return kDot && !kEach ? add_lanes<S>(totals[0] + totals[1]) : 0;
}

// A map a · z + b that is not in memory: z is, and a and b are one number for each channel, as those of a normalisation.
template <class S>
struct Channels {
  int64_t count = 0, inner = 1;    // element k of a sample has channel k / inner % count
  std::vector<S> scale, shift;     // if the channels are next to each other, repeated to a whole number of vectors

  bool is_set() const { return count > 0; }
};

// Σ grad · (scale · values + shift) over `size` elements, from element `begin` of a sample on, a multiple of kLanes. `grad` has
// whole vectors.
template <class S, class T>
double dot_channels(const S* grad, const T* values, const Channels<S>& channels, int64_t begin, int64_t size) {
  Vector<S> total{};
  if (channels.inner == 1) {
    const int64_t period = static_cast<int64_t>(channels.scale.size());
    for (int64_t k = 0, at = begin % period; k < size; k += kLanes<S>) {
      fetch_ahead(values + k);
      const Vector<S> read = load_some<S>(values + k, size - k);
      total += load(grad + k) * (load(channels.scale.data() + at) * read + load(channels.shift.data() + at));
      at = at + kLanes<S> == period ? 0 : at + kLanes<S>;
    }
    return add_lanes<S>(total);
  }
  Vector<S> lane;
  for (int64_t k = 0; k < kLanes<S>; ++k) lane[k] = static_cast<S>(k);
  for (int64_t k = 0; k < size;) {  // one channel at a time
    const int64_t channel = (begin + k) / channels.inner % channels.count;
    const int64_t end = std::min(size, k + channels.inner - (begin + k) % channels.inner);
    const S scale = channels.scale[channel], shift = channels.shift[channel];
    while (k < end) {
      const int64_t count = std::min(kLanes<S>, end - k);
      fetch_ahead(values + k);
      const Vector<S> upstream = load(grad + k), own = lane < static_cast<S>(count) ? upstream : Vector<S>{};
      total += own * (scale * load_some<S>(values + k, size - k) + shift);
      k += count;
    }
  }
  return add_lanes<S>(total);
}

// How the maps lie in memory: each sample is one block of `size` elements, (outer, groups, inner).
struct Layout {
  int64_t samples, size, outer, groups, inner;
  std::vector<int64_t> strides;  // of one sample

  // Whether each element of a row has a weight of its own: with groups and channels last. A row is then one position.
  bool is_each() const { return groups > 1 && outer > 1; }
  int64_t rows() const { return is_each() ? outer : groups; }
  int64_t row_size() const { return size / std::max<int64_t>(rows(), 1); }

  Tensor empty(const Tensor& like, ScalarType type) const {
    std::vector<int64_t> sizes = like.sizes().vec(), all = {size};
    sizes[0] = samples;
    all.insert(all.end(), strides.begin(), strides.end());
    return at::empty_strided(sizes, all, like.options().dtype(type));
  }

  // `map` as it is if its samples lie like this, otherwise a copy that does.
  Tensor arrange(const Tensor& map) const {
    bool fits = true;
    for (int64_t dim = 1; dim < map.dim(); ++dim) {
      fits = fits && (map.size(dim) == 1 || map.stride(dim) == strides[dim - 1]);
    }
    if (fits) return map;
    std::vector<int64_t> all = {size};
    all.insert(all.end(), strides.begin(), strides.end());
    return at::empty_strided(map.sizes(), all, map.options()).copy_(map);
  }
};

Layout find_layout(const Tensor& like, int64_t samples, int64_t groups) {
  Layout layout{samples, 1, 1, groups, 1, {}};
  for (int64_t dim = 1; dim < like.dim(); ++dim) layout.size *= like.size(dim);
  const auto options = like.options().device(at::kMeta);  // no memory: only the strides that torch chooses are wanted
  const Tensor sample = at::empty_strided(like.sizes().slice(1), like.strides().slice(1), options);
  layout.strides = at::empty_like(sample).strides().vec();
  layout.inner = groups > 1 ? layout.strides[0] : layout.size;
  layout.outer = layout.size == 0 ? 1 : layout.size / (groups * layout.inner);
  return layout;
}

bool is_supported(ScalarType type) {
  return type == at::kFloat || type == at::kDouble || type == at::kBFloat16 || type == at::kHalf;
}

// The inputs of an aggregation, checked.
template <class S>
struct Inputs {
  Layout layout;
  int64_t edges;
  std::vector<Tensor> maps;       // arranged
  std::vector<const char*> data;  // of each map
  std::vector<int64_t> bytes;     // from one sample of a map to the next
  Tensor weights, is_open, rows;  // contiguous; the last two may be undefined
  std::vector<S> spread;          // (B, E, row): with a weight for each element of a row

  bool opens(int64_t sample, int64_t edge) const {
    return !is_open.defined() || is_open.const_data_ptr<bool>()[sample * edges + edge];
  }

  int64_t row(int64_t sample, int64_t edge) const {
    if (!rows.defined()) return sample;
    const int64_t row = rows.const_data_ptr<int64_t>()[edge * layout.samples + sample];
    TORCH_CHECK_INDEX(row >= 0 && row < maps[edge].size(0), "dgnet::aggregate: a feature of ", maps[edge].size(0),
                      " samples has no row ", row);
    return row;
  }

  S weight(int64_t sample, int64_t edge, int64_t group) const {
    return weights.const_data_ptr<S>()[(sample * edges + edge) * layout.groups + group];
  }

  const S* row_weights(int64_t sample, int64_t edge) const {
    return spread.data() + (sample * edges + edge) * layout.row_size();
  }

  // Where a map's row begins, in elements of a sample.
  int64_t offset(int64_t row) const { return row * layout.row_size(); }
};

// `map` as kernels of type S read it: arranged, and in float64 if and only if S is.
template <class S>
Tensor arrange_as(const Tensor& map, const Layout& layout) {
  TORCH_CHECK(map.is_cpu(), "dgnet::aggregate: the CPU kernel needs maps on the CPU, got ", map.toString());
  const bool is_read = is_supported(map.scalar_type()) && (map.scalar_type() == at::kDouble) == (kSums<S> == at::kDouble);
  return layout.arrange(is_read ? map : map.to(kSums<S>));
}

// The gradient of a sum.
template <class S>
struct Upstream {
  Tensor map;
  const char* data;
  int64_t bytes;  // from one sample to the next

  Upstream(const Tensor& grad, const Layout& layout)
      : map(arrange_as<S>(grad, layout)),
        data(static_cast<const char*>(map.const_data_ptr())),
        bytes((layout.samples > 1 ? map.stride(0) : 0) * map.element_size()) {}

  // Elements `begin` to `begin + size` of a sample, as read_chunk gives them.
  void read(S* to, int64_t sample, int64_t begin, int64_t size) const {
    read_chunk<S>(to, data + sample * bytes, map.scalar_type(), begin, size);
  }
};

Tensor to_sums(const Tensor& values, ScalarType type) { return values.to(type).contiguous(); }

template <class S>
Inputs<S> check_inputs(at::TensorList features, const Tensor& weights, const std::optional<Tensor>& is_open,
                       const std::optional<Tensor>& rows, const Tensor& like) {
  const int64_t edges = static_cast<int64_t>(features.size());
  TORCH_CHECK(weights.dim() == 2 || weights.dim() == 3, "dgnet::aggregate: weights must be (B, E) or (B, E, g), got ",
              weights.sizes());
  TORCH_CHECK(weights.size(1) == edges, "dgnet::aggregate: ", edges, " features need weights of ", edges, " edges, got ",
              weights.sizes());
  const int64_t samples = weights.size(0), groups = weights.dim() == 3 ? weights.size(2) : 1;
  TORCH_CHECK(weights.dim() == 2 || (like.dim() > 1 && like.size(1) == groups), "dgnet::aggregate: weights ", weights.sizes(),
              " of ", groups, " groups need features (B, ", groups, ", …), got ", like.sizes());
  Inputs<S> inputs;
  inputs.edges = edges;
  inputs.layout = find_layout(like, samples, groups);
  for (const Tensor& feature : features) {
    TORCH_CHECK(feature.is_cpu() && is_supported(feature.scalar_type()),
                "dgnet::aggregate: the CPU kernel needs features of 16, 32 or 64 bits on the CPU, got ", feature.toString());
    TORCH_CHECK(feature.dim() == like.dim() && feature.sizes().slice(1) == like.sizes().slice(1) &&
                    (rows || feature.size(0) == samples),
                "dgnet::aggregate: the features of one sum must have one shape, with ", samples, " samples; got ",
                like.sizes(), " and ", feature.sizes());
    inputs.maps.push_back(arrange_as<S>(feature, inputs.layout));
    const Tensor& map = inputs.maps.back();
    inputs.data.push_back(static_cast<const char*>(map.const_data_ptr()));
    inputs.bytes.push_back((map.size(0) > 1 ? map.stride(0) : 0) * map.element_size());
  }
  inputs.weights = to_sums(weights, kSums<S>);
  if (is_open) {
    TORCH_CHECK(is_open->scalar_type() == at::kBool && is_open->dim() == 2 && is_open->size(0) == samples &&
                    is_open->size(1) == edges,
                "dgnet::aggregate: is_open must be bool, (", samples, ", ", edges, "), got ", is_open->toString(), " ",
                is_open->sizes());
    inputs.is_open = is_open->contiguous();
  }
  if (rows) {
    TORCH_CHECK(rows->scalar_type() == at::kLong && rows->dim() == 2 && rows->size(0) == edges && rows->size(1) == samples,
                "dgnet::aggregate: rows must be int64, (", edges, ", ", samples, "), got ", rows->toString(), " ",
                rows->sizes());
    inputs.rows = rows->contiguous();
  }
  if (inputs.layout.is_each()) {
    const int64_t inner = inputs.layout.inner;
    const S* const values = inputs.weights.template const_data_ptr<S>();
    inputs.spread.reserve(inputs.weights.numel() * inner);
    for (int64_t k = 0; k < inputs.weights.numel(); ++k) inputs.spread.insert(inputs.spread.end(), inner, values[k]);
  }
  return inputs;
}

// The chunks of all rows of all samples.
struct Tasks {
  int64_t rows, parts, size, count, grain;

  Tasks(const Layout& layout, int64_t edges)
      : rows(layout.is_each() ? 1 : layout.rows()),
        parts(0),
        size(0),
        count(0),
        grain(1) {
    // With a weight for each element, a task is some whole rows.
    const int64_t length = layout.is_each() ? layout.rows() : layout.row_size();
    size = layout.is_each() ? std::max<int64_t>(kChunk / layout.row_size(), 1) : kChunk;
    parts = (length + size - 1) / size;
    count = layout.samples * rows * parts;
    const int64_t work = std::min(size, length) * (layout.is_each() ? layout.row_size() : 1) * edges;
    grain = std::max<int64_t>(kWork / std::max<int64_t>(work, 1), 1);
  }
};

template <class S>
Tensor aggregate_as(at::TensorList features, const Tensor& weights, const std::optional<Tensor>& is_open,
                    const std::optional<Tensor>& rows) {
  const Tensor& like = features[0];
  const Inputs<S> inputs = check_inputs<S>(features, weights, is_open, rows, like);
  const Layout& layout = inputs.layout;
  const Tensor out = layout.empty(like, like.scalar_type());
  char* const target = static_cast<char*>(out.mutable_data_ptr());
  const int64_t item = out.element_size(), width = layout.row_size();
  const bool is_each = layout.is_each();
  const Tasks tasks(layout, inputs.edges);
  at::parallel_for(0, tasks.count, tasks.grain, [&](int64_t first, int64_t last) {
    std::vector<S> sum(std::max(kChunk, is_each ? width : 0) + kLanes<S>);
    std::vector<Term<S>> terms, moved;
    int64_t found = -1;
    for (int64_t task = first; task < last; ++task) {
      const int64_t part = task % tasks.parts, row = task / tasks.parts % tasks.rows, sample = task / tasks.parts / tasks.rows;
      if (sample * tasks.rows + row != found) {
        found = sample * tasks.rows + row;
        terms.clear();
        for (int64_t edge = 0; edge < inputs.edges; ++edge) {
          if (!inputs.opens(sample, edge)) continue;
          const Tensor& map = inputs.maps[edge];
          const char* const data = inputs.data[edge] + inputs.row(sample, edge) * inputs.bytes[edge];
          terms.push_back({data + row * width * map.element_size(), map.scalar_type(),
                           is_each ? S{0} : inputs.weight(sample, edge, row),
                           is_each ? inputs.row_weights(sample, edge) : nullptr});
        }
      }
      char* const to = target + (sample * layout.size + (is_each ? 0 : row * width)) * item;
      if (!is_each) {
        const int64_t begin = part * tasks.size;
        sum_chunk<S, false>(sum.data(), terms, to, out.scalar_type(), begin, std::min(tasks.size, width - begin));
        continue;
      }
      for (int64_t position = part * tasks.size; position < std::min((part + 1) * tasks.size, layout.outer); ++position) {
        sum_chunk<S, true>(sum.data(), terms, to, out.scalar_type(), position * width, width);
      }
    }
  });
  return out;
}

// Σ_i w_ri · map_i for each r, written over the maps 0 to R - 1. `weights`: (B, R, E); `is_open`: the same, or null.
template <class S>
void partial_sums_as(at::TensorList features, const Tensor& weights, const std::optional<Tensor>& is_open) {
  const int64_t edges = static_cast<int64_t>(features.size());
  TORCH_CHECK(weights.dim() == 3 && weights.size(1) <= edges && weights.size(2) == edges, "dgnet::partial_sums: ", edges,
              " features need weights (B, R, ", edges, ") with R of at most ", edges, ", got ", weights.sizes());
  TORCH_CHECK(!is_open || is_open->sizes() == weights.sizes(), "dgnet::partial_sums: is_open must be ", weights.sizes(), ", got ",
              is_open->sizes());
  const int64_t sums = weights.size(1);
  const std::optional<Tensor> opened = is_open ? std::optional<Tensor>(is_open->flatten(1).contiguous()) : std::nullopt;
  if (opened) TORCH_CHECK(opened->scalar_type() == at::kBool, "dgnet::partial_sums: is_open must be bool, got ", opened->toString());
  Inputs<S> inputs = check_inputs<S>(features, weights.select(1, 0), std::nullopt, std::nullopt, features[0]);
  std::vector<char*> targets;
  for (int64_t row = 0; row < sums; ++row) {
    const Tensor& map = inputs.maps[row];
    TORCH_CHECK(map.size(0) < 2 || map.stride(0) >= inputs.layout.size,
                "dgnet::partial_sums: the samples of a feature that is written over must not share memory");
    targets.push_back(static_cast<char*>(map.mutable_data_ptr()));
    inputs.data[row] = targets.back();
  }
  const Tensor all = to_sums(weights, kSums<S>);
  const S* const weight = all.template const_data_ptr<S>();
  const bool* const passes = opened ? opened->const_data_ptr<bool>() : nullptr;
  const Layout& layout = inputs.layout;
  const int64_t parts = (layout.size + kPartial - 1) / kPartial;
  const int64_t grain = std::max<int64_t>(kWork / std::max<int64_t>(std::min(kPartial, layout.size) * edges, 1), 1);
  at::parallel_for(0, layout.samples * parts, grain, [&](int64_t first, int64_t last) {
    std::vector<S> chunks(edges * kPartial + kLanes<S>), sum(kPartial + kLanes<S>);
    std::vector<Term<S>> terms;
    for (int64_t task = first; task < last; ++task) {
      const int64_t sample = task / parts, begin = task % parts * kPartial, size = std::min(kPartial, layout.size - begin);
      for (int64_t edge = 0; edge < edges; ++edge) {  // all are read before the first is written over
        const char* const map = inputs.data[edge] + sample * inputs.bytes[edge];
        read_chunk<S>(chunks.data() + edge * kPartial, map, inputs.maps[edge].scalar_type(), begin, size);
      }
      for (int64_t row = 0; row < sums; ++row) {
        terms.clear();
        for (int64_t edge = 0; edge < edges; ++edge) {
          const int64_t at = (sample * sums + row) * edges + edge;
          const char* const values = reinterpret_cast<const char*>(chunks.data() + edge * kPartial);
          if (!passes || passes[at]) terms.push_back({values, kSums<S>, weight[at], nullptr});
        }
        const Tensor& map = inputs.maps[row];
        char* const to = targets[row] + sample * inputs.bytes[row] + begin * map.element_size();
        sum_chunk<S, false>(sum.data(), terms, to, map.scalar_type(), 0, size);
      }
    }
  });
  for (int64_t row = 0; row < sums; ++row) {  // one that lay otherwise was copied
    if (!inputs.maps[row].is_same(features[row])) features[row].copy_(inputs.maps[row]);
  }
}

// One call of pass_back.
template <class S>
struct Back {
  const S* grad;
  const char* values;
  char* to;
  S weight;
  const S* weights;
  S* products;

  template <class T, bool kEach>
  double run(int64_t begin, int64_t size) const {
    const T* const from = reinterpret_cast<const T*>(values) + begin;
    T* const out = reinterpret_cast<T*>(to) + begin;
    if (values && to) return pass_back<S, T, true, true, kEach>(grad, from, out, weight, weights, products, size);
    if (values) return pass_back<S, T, true, false, kEach>(grad, from, nullptr, weight, weights, products, size);
    return pass_back<S, T, false, true, kEach>(grad, nullptr, out, weight, weights, products, size);
  }
};

// The gradients of the weights, like `weights`, from the sums of each part of a map, (B, parts, E, g).
template <class S>
Tensor add_parts(const std::vector<double>& partial, int64_t parts, const Tensor& weights) {
  const Tensor sums = at::empty(weights.sizes(), weights.options());
  S* const to = sums.template mutable_data_ptr<S>();
  const int64_t samples = weights.size(0), numbers = samples ? weights.numel() / samples : 0;
  for (int64_t sample = 0; sample < samples; ++sample) {
    for (int64_t k = 0; k < numbers; ++k) {
      double total = 0;
      for (int64_t part = 0; part < parts; ++part) total += partial[(sample * parts + part) * numbers + k];
      to[sample * numbers + k] = static_cast<S>(total);
    }
  }
  return sums;
}

template <class S>
std::tuple<Tensor, std::vector<Tensor>> aggregate_backward_as(const Tensor& grad, at::TensorList features, const Tensor& weights,
                                                              const std::optional<Tensor>& is_open, bool needs_weights,
                                                              const c10::List<bool>& needs_features) {
  const Tensor& like = features[0];
  const Inputs<S> inputs = check_inputs<S>(features, weights, is_open, std::nullopt, like);
  const Layout& layout = inputs.layout;
  TORCH_CHECK(static_cast<int64_t>(needs_features.size()) == inputs.edges && grad.sizes() == like.sizes(),
              "dgnet::aggregate_backward: one gradient for ", inputs.edges, " features ", like.sizes(), " is needed, got ",
              grad.sizes(), " and ", needs_features.size(), " flags");
  const Upstream<S> upstream(grad, layout);
  std::vector<Tensor> grads, written;
  std::vector<char*> targets(inputs.edges, nullptr);
  for (int64_t edge = 0; edge < inputs.edges; ++edge) {
    if (!needs_features.get(edge)) continue;
    grads.push_back(layout.empty(like, inputs.maps[edge].scalar_type()));
    targets[edge] = static_cast<char*>(grads.back().mutable_data_ptr());
  }
  const int64_t width = layout.row_size(), groups = layout.groups;
  const bool is_each = layout.is_each();
  const Tasks tasks(layout, inputs.edges);
  // Sums of the weights' gradients, (B, parts, E, g): each task writes its own, so their order never changes.
  std::vector<double> partial(needs_weights ? layout.samples * tasks.parts * inputs.edges * groups : 0, 0.0);
  at::parallel_for(0, tasks.count, tasks.grain, [&](int64_t first, int64_t last) {
    std::vector<S> chunk(std::max(kChunk, is_each ? width : 0) + kLanes<S>), products(is_each ? inputs.edges * width : 0);
    for (int64_t task = first; task < last; ++task) {
      const int64_t part = task % tasks.parts, row = task / tasks.parts % tasks.rows, sample = task / tasks.parts / tasks.rows;
      const int64_t offset = is_each ? 0 : row * width;
      double* const sums = needs_weights ? partial.data() + (sample * tasks.parts + part) * inputs.edges * groups : nullptr;
      std::fill(products.begin(), products.end(), S{0});
      const int64_t begin = is_each ? part * tasks.size : 0, end = is_each ? std::min(begin + tasks.size, layout.outer) : 1;
      for (int64_t position = begin; position < end; ++position) {
        const int64_t from = is_each ? position * width : part * tasks.size;
        const int64_t size = is_each ? width : std::min(tasks.size, width - from);
        upstream.read(chunk.data(), sample, offset + from, size);
        for (int64_t edge = 0; edge < inputs.edges; ++edge) {
          const int64_t item = inputs.maps[edge].element_size();
          char* const to = targets[edge] ? targets[edge] + (sample * layout.size + offset) * item : nullptr;
          if (!inputs.opens(sample, edge)) {
            if (to) std::memset(to + from * item, 0, size * item);
            continue;
          }
          const char* const values = needs_weights ? inputs.data[edge] + sample * inputs.bytes[edge] + offset * item : nullptr;
          if (!values && !to) continue;
          const Back<S> back{chunk.data(), values, to, is_each ? S{0} : inputs.weight(sample, edge, row),
                             is_each ? inputs.row_weights(sample, edge) : nullptr, products.data() + (is_each ? edge * width : 0)};
          with_type<S>(inputs.maps[edge].scalar_type(), [&](auto element) {
            using T = decltype(element);
            const double sum = is_each ? back.template run<T, true>(from, size) : back.template run<T, false>(from, size);
            if (sums && !is_each) sums[edge * groups + row] = sum;
          });
        }
      }
      for (int64_t k = 0; sums && k < static_cast<int64_t>(products.size()); ++k) sums[k / layout.inner] += products[k];
    }
  });
  for (int64_t edge = 0, next = 0; edge < inputs.edges; ++edge) {
    if (!needs_features.get(edge)) continue;
    grads[next] = grads[next].to(features[edge].scalar_type());
    ++next;
  }
  if (!needs_weights) return {at::empty({0}, weights.options()), std::move(grads)};
  return {add_parts<S>(partial, tasks.parts, inputs.weights).to(weights.scalar_type()), std::move(grads)};
}

// The numbers of each channel, (C,), as `dot_channels` reads them; not set where `scale` is null.
template <class S>
Channels<S> read_channels(const std::optional<Tensor>& scale, const std::optional<Tensor>& shift, const Layout& layout, int64_t count) {
  Channels<S> channels;
  if (!scale) return channels;
  TORCH_CHECK(shift && scale->dim() == 1 && scale->size(0) == count && shift->sizes() == scale->sizes(),
              "dgnet::weight_gradients: features of ", count, " channels need as many scales and shifts");
  channels.count = count;
  channels.inner = count > 1 ? layout.strides[0] : layout.size;
  const int64_t repeats = channels.inner == 1 ? kLanes<S> / std::gcd(count, kLanes<S>) : 1;
  for (const auto& [from, to] : {std::pair(&*scale, &channels.scale), std::pair(&*shift, &channels.shift)}) {
    const Tensor values = to_sums(*from, kSums<S>);
    const S* const data = values.template const_data_ptr<S>();
    for (int64_t k = 0; k < repeats; ++k) to->insert(to->end(), data, data + count);
  }
  return channels;
}

template <class S>
Tensor weight_gradients_as(const Tensor& grad, at::TensorList features, const c10::List<std::optional<Tensor>>& scales,
                           const c10::List<std::optional<Tensor>>& shifts, const Tensor& weights,
                           const std::optional<Tensor>& is_open) {
  const Tensor& like = features[0];
  TORCH_CHECK(weights.dim() == 2, "dgnet::weight_gradients: weights must be (B, E), got ", weights.sizes());
  const Inputs<S> inputs = check_inputs<S>(features, weights, is_open, std::nullopt, like);
  const Layout& layout = inputs.layout;
  const int64_t edges = inputs.edges;
  TORCH_CHECK(static_cast<int64_t>(scales.size()) == edges && static_cast<int64_t>(shifts.size()) == edges && grad.sizes() == like.sizes(),
              "dgnet::weight_gradients: one gradient, and scales and shifts for ", edges, " features ", like.sizes(), " are needed, got ",
              grad.sizes(), ", ", scales.size(), " and ", shifts.size());
  std::vector<Channels<S>> channels;
  for (int64_t edge = 0; edge < edges; ++edge) {
    channels.push_back(read_channels<S>(scales.get(edge), shifts.get(edge), layout, like.dim() > 1 ? like.size(1) : 1));
  }
  const Upstream<S> upstream(grad, layout);
  const Tasks tasks(layout, edges);
  std::vector<double> partial(layout.samples * tasks.parts * edges, 0.0);  // (B, parts, E)
  at::parallel_for(0, tasks.count, tasks.grain, [&](int64_t first, int64_t last) {
    std::vector<S> chunk(kChunk + kLanes<S>);
    for (int64_t task = first; task < last; ++task) {
      const int64_t sample = task / tasks.parts, from = task % tasks.parts * tasks.size;
      const int64_t size = std::min(tasks.size, layout.size - from);
      upstream.read(chunk.data(), sample, from, size);
      for (int64_t edge = 0; edge < edges; ++edge) {
        if (!inputs.opens(sample, edge)) continue;
        with_type<S>(inputs.maps[edge].scalar_type(), [&](auto element) {
          using T = decltype(element);
          const T* const values = reinterpret_cast<const T*>(inputs.data[edge] + sample * inputs.bytes[edge]) + from;
          partial[task * edges + edge] =
              channels[edge].is_set()
                  ? dot_channels<S, T>(chunk.data(), values, channels[edge], from, size)
                  : pass_back<S, T, true, false, false>(chunk.data(), values, nullptr, S{0}, nullptr, nullptr, size);
        });
      }
    }
  });
  return add_parts<S>(partial, tasks.parts, inputs.weights).to(weights.scalar_type());
}

Tensor aggregate(at::TensorList features, const Tensor& weights, const std::optional<Tensor>& is_open,
                 const std::optional<Tensor>& rows) {
  TORCH_CHECK(!features.empty(), "dgnet::aggregate: there are no features");
  const bool is_double = features[0].scalar_type() == at::kDouble;
  return is_double ? aggregate_as<double>(features, weights, is_open, rows)
                   : aggregate_as<float>(features, weights, is_open, rows);
}

std::tuple<Tensor, std::vector<Tensor>> aggregate_backward(const Tensor& grad, at::TensorList features, const Tensor& weights,
                                                           const std::optional<Tensor>& is_open, bool needs_weights,
                                                           c10::List<bool> needs_features) {
  TORCH_CHECK(!features.empty(), "dgnet::aggregate_backward: there are no features");
  const bool is_double = features[0].scalar_type() == at::kDouble;
  return is_double ? aggregate_backward_as<double>(grad, features, weights, is_open, needs_weights, needs_features)
                   : aggregate_backward_as<float>(grad, features, weights, is_open, needs_weights, needs_features);
}

Tensor weight_gradients(const Tensor& grad, at::TensorList features, const c10::List<std::optional<Tensor>>& scales,
                        const c10::List<std::optional<Tensor>>& shifts, const Tensor& weights, const std::optional<Tensor>& is_open) {
  TORCH_CHECK(!features.empty(), "dgnet::weight_gradients: there are no features");
  const bool is_double = features[0].scalar_type() == at::kDouble;
  return is_double ? weight_gradients_as<double>(grad, features, scales, shifts, weights, is_open)
                   : weight_gradients_as<float>(grad, features, scales, shifts, weights, is_open);
}

void partial_sums(at::TensorList features, const Tensor& weights, const std::optional<Tensor>& is_open) {
  TORCH_CHECK(!features.empty(), "dgnet::partial_sums: there are no features");
  if (weights.size(1) == 0) return;
  features[0].scalar_type() == at::kDouble ? partial_sums_as<double>(features, weights, is_open)
                                           : partial_sums_as<float>(features, weights, is_open);
}

}  // namespace

TORCH_LIBRARY_IMPL(dgnet, CPU, m) {
  m.impl("aggregate", &aggregate);
  m.impl("aggregate_backward", &aggregate_backward);
  m.impl("weight_gradients", &weight_gradients);
  m.impl("partial_sums", &partial_sums);
}
