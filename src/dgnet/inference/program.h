// A block as a list of operations on registers. dgnet.inference._lower writes it.
//
// Registers hold maps (n, C, H, W) in float32 with channels last. Register 0 is the block's input.

#pragma once

#include <ATen/ATen.h>
#include <torch/custom_class.h>

#include <array>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "kernels.h"

namespace dgnet {

using at::Tensor;
using Ints = std::vector<int64_t>;

constexpr int64_t kCacheBytes = 1024 * 1024;  // of the largest map of some samples that go through a block together
constexpr int64_t kChannels = 256;            // channels that are averaged together
constexpr int64_t kGrain = 32 * 1024;         // fewest elements for which another thread pays off

inline int64_t grain(int64_t elements) { return std::max<int64_t>(1, kGrain / std::max<int64_t>(elements, 1)); }

using Map = std::array<int64_t, 3>;  // C, H, W

inline Map form(const Tensor& map) { return {map.size(1), map.size(2), map.size(3)}; }

inline Tensor empty_map(int64_t samples, const Map& form, const Tensor& like) {
  return at::empty({samples, form[0], form[1], form[2]}, like.options(), at::MemoryFormat::ChannelsLast);
}

inline Function find_function(const std::string& name) {
  static const std::map<std::string, Function> functions = {
      {"none", Function::kNone},           {"clamp", Function::kClamp}, {"leaky", Function::kLeaky},
      {"hard_swish", Function::kHardSwish}, {"hard_sigmoid", Function::kHardSigmoid},
      {"sigmoid", Function::kSigmoid},     {"silu", Function::kSilu},   {"tanh", Function::kTanh},
      {"gelu", Function::kGelu},           {"gelu_tanh", Function::kGeluTanh}};
  const auto found = functions.find(name);
  TORCH_CHECK(found != functions.end(), "unknown function ", name);
  return found->second;
}

// One operation. Missing registers are -1.
struct Operation {
  enum class Kind { kConvolve, kCombine, kAffine, kNormalize, kAverage, kScale };

  Kind kind;
  int64_t out;
  Ints inputs;  // convolve: x, added, subtracted; combine: x, added, subtracted; scale: x, one factor for each sample and channel
  Activation activation;
  std::unique_ptr<Packed> weight;  // of a convolution
  Floats scale, shift;             // of the channels; the shift is also the bias of a convolution
  Shape shape;                     // of a convolution; sizes are those of the last call
  bool pads_same = false;          // TensorFlow's padding: as many outputs as strides fit in
  double epsilon = 0;

  // (C, H, W) of the result for an input of that form.
  Map infer(const Map& in) const {
    if (kind == Kind::kAverage) return {in[0], 1, 1};
    if (kind != Kind::kConvolve) return in;
    const Shape actual = fit(in);
    return {weight->out_channels, actual.out_size[0], actual.out_size[1]};
  }

  // Computes into `out`, an empty map of the inferred form.
  void run(const std::vector<Tensor>& registers, const Tensor& out) const {
    const Tensor& x = registers[inputs[0]];
    switch (kind) {
      case Kind::kConvolve: return convolve_map(x, find(registers, 1), find(registers, 2), out);
      case Kind::kCombine: return combine(x, find(registers, 1), find(registers, 2), out);
      case Kind::kAffine: return apply_affine(x, out);
      case Kind::kNormalize: return normalize(x, out);
      case Kind::kAverage: return average(x, out);
      case Kind::kScale: return scale_channels(x, registers[inputs[1]], out);
    }
  }

 private:
  Shape fit(const Map& in) const {
    TORCH_CHECK(in[0] == weight->in_channels, "a convolution reads ", weight->in_channels, " channels, got ", in[0]);
    Shape actual = shape;
    for (int axis = 0; axis < 2; ++axis) {
      const int64_t size = actual.in_size[axis] = in[1 + axis];
      const int64_t reach = (shape.kernel[axis] - 1) * shape.dilation[axis];
      if (pads_same) {
        actual.out_size[axis] = (size + shape.stride[axis] - 1) / shape.stride[axis];
        actual.padding[axis] = std::max<int64_t>((actual.out_size[axis] - 1) * shape.stride[axis] + reach + 1 - size, 0) / 2;
      } else {
        actual.out_size[axis] = (size + 2 * shape.padding[axis] - reach - 1) / shape.stride[axis] + 1;
      }
      TORCH_CHECK(size + 2 * actual.padding[axis] > reach, "a kernel is larger than its map: ", in[1], "x", in[2]);
    }
    return actual;
  }

  const Tensor* find(const std::vector<Tensor>& registers, size_t input) const {
    return input < inputs.size() && inputs[input] >= 0 ? &registers[inputs[input]] : nullptr;
  }

  static const float* data(const Tensor* map) { return map == nullptr ? nullptr : map->const_data_ptr<float>(); }

  static void check_shapes(const Tensor& out, std::initializer_list<const Tensor*> maps) {
    for (const Tensor* map : maps) {
      TORCH_CHECK(map == nullptr || map->sizes() == out.sizes(), "maps of shapes ", out.sizes(), " and ",
                  map == nullptr ? out.sizes() : map->sizes(), " cannot be added");
    }
  }

  void convolve_map(const Tensor& x, const Tensor* added, const Tensor* subtracted, const Tensor& out) const {
    check_shapes(out, {added, subtracted});
    const Finish finish{shift.empty() ? nullptr : shift.data(), data(added), data(subtracted), activation};
    convolve(x.const_data_ptr<float>(), out.mutable_data_ptr<float>(), *weight, fit(form(x)), x.size(0), finish);
  }

  // act(x + added) - subtracted
  void combine(const Tensor& x, const Tensor* added, const Tensor* subtracted, const Tensor& out) const {
    check_shapes(out, {added, subtracted});
    const Finish finish{nullptr, data(added), data(subtracted), activation};
    const float* from = x.const_data_ptr<float>();
    float* to = out.mutable_data_ptr<float>();
    at::parallel_for(0, x.numel(), kGrain, [&](int64_t begin, int64_t end) {
      for (int64_t at = begin; at < end; at += kWidth) {
        store(to + at, finish(load(from + at, end - at), at, end - at), end - at);
      }
    });
  }

  // act(x · scale + shift), of each channel
  void apply_affine(const Tensor& x, const Tensor& out) const {
    const int64_t channels = x.size(1);
    TORCH_CHECK(channels == static_cast<int64_t>(scale.size()), "a normalisation of ", scale.size(), " channels got ", channels);
    const float* from = x.const_data_ptr<float>();
    float* to = out.mutable_data_ptr<float>();
    for_positions(x, [&](int64_t position) {
      for (int64_t c = 0; c < channels; c += kWidth) {
        const int64_t at = position * channels + c, count = channels - c;
        store(to + at, activation(load(from + at, count) * load(scale.data() + c, count) + load(shift.data() + c, count)), count);
      }
    });
  }

  // Layer normalisation of the channels of each position.
  void normalize(const Tensor& x, const Tensor& out) const {
    const int64_t channels = x.size(1);
    TORCH_CHECK(channels == static_cast<int64_t>(scale.size()), "a normalisation of ", scale.size(), " channels got ", channels);
    for_positions(x, [&, from = x.const_data_ptr<float>(), to = out.mutable_data_ptr<float>()](int64_t position) {
      const float* in = from + position * channels;
      Vector sum = {}, squares = {};
      for (int64_t c = 0; c < channels; c += kWidth) sum += load(in + c, channels - c);
      const float mean = total(sum) / channels;
      for (int64_t c = 0; c < channels; c += kWidth) {
        const Vector value = load(in + c, channels - c) - mean;
        squares += value * value;
      }
      const int64_t unused = (kWidth - channels % kWidth) % kWidth;  // lanes beyond the channels: each added mean²
      const float variance = (total(squares) - unused * mean * mean) / channels;
      const float factor = 1 / std::sqrt(std::max(variance, 0.0f) + static_cast<float>(epsilon));
      for (int64_t c = 0; c < channels; c += kWidth) {
        const int64_t count = channels - c;
        const Vector value = (load(in + c, count) - mean) * factor;
        store(to + position * channels + c,
              activation(value * load(scale.data() + c, count) + load(shift.data() + c, count)), count);
      }
    });
  }

  // The mean of each channel, (n, C, 1, 1).
  void average(const Tensor& x, const Tensor& out) const {
    const int64_t channels = x.size(1), area = x.size(2) * x.size(3), blocks = (channels + kChannels - 1) / kChannels;
    const float* from = x.const_data_ptr<float>();
    float* to = out.mutable_data_ptr<float>();
    at::parallel_for(0, x.size(0) * blocks, grain(area * kChannels), [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        const int64_t sample = task / blocks, first = task % blocks * kChannels;
        for (int64_t c = first; c < std::min(first + kChannels, channels); c += kWidth) {
          const float* at = from + sample * area * channels + c;
          Vector sums[4] = {};  // in parts: they are independent, and one long sum would round more
          for (int64_t position = 0; position < area; ++position) {
            sums[position % 4] += load(at + position * channels, channels - c);
          }
          store(to + sample * channels + c, ((sums[0] + sums[1]) + (sums[2] + sums[3])) * (1.0f / area), channels - c);
        }
      }
    });
  }

  // x · factors, (n, C, 1, 1)
  void scale_channels(const Tensor& x, const Tensor& factors, const Tensor& out) const {
    TORCH_CHECK(factors.size(0) == x.size(0) && factors.size(1) == x.size(1) && factors.numel() == x.size(0) * x.size(1),
                "a map of shape ", x.sizes(), " cannot be scaled by ", factors.sizes());
    const int64_t channels = x.size(1), area = x.size(2) * x.size(3);
    const float *from = x.const_data_ptr<float>(), *factor = factors.const_data_ptr<float>();
    float* to = out.mutable_data_ptr<float>();
    for_positions(x, [&](int64_t position) {
      const float* by = factor + position / area * channels;
      for (int64_t c = 0; c < channels; c += kWidth) {
        const int64_t at = position * channels + c, count = channels - c;
        store(to + at, load(from + at, count) * load(by + c, count), count);
      }
    });
  }

  static float total(const Vector& lanes) {
    float sum = 0;
    for (int lane = 0; lane < kWidth; ++lane) sum += lanes[lane];
    return sum;
  }

  template <typename Body>
  static void for_positions(const Tensor& x, const Body& body) {
    const int64_t positions = x.size(0) * x.size(2) * x.size(3);
    at::parallel_for(0, positions, grain(x.size(1)), [&](int64_t begin, int64_t end) {
      for (int64_t position = begin; position < end; ++position) body(position);
    });
  }
};

struct Program : torch::CustomClassHolder {
  // Append a convolution. `geometry`: stride, padding and dilation of both axes, and the number of groups; `inputs`: x, and the
  // registers that are added before the activation and subtracted after it. For `bounds` see `Activation`.
  void add_convolution(int64_t out, Ints inputs, const Tensor& weight, const std::optional<Tensor>& bias, Ints geometry,
                       bool pads_same, const std::string& function, double first, double second) {
    Operation& operation = add(Operation::Kind::kConvolve, out, std::move(inputs), function, first, second);
    const Tensor values = weight.contiguous();
    const int64_t groups = geometry[6];
    operation.weight = std::make_unique<Packed>(values.const_data_ptr<float>(), values.size(1) * groups, values.size(0), groups,
                                                values.size(2) * values.size(3));
    if (bias) operation.shift = copy(*bias);
    operation.shape = {{values.size(2), values.size(3)}, {geometry[0], geometry[1]}, {geometry[4], geometry[5]},
                       {geometry[2], geometry[3]}, {0, 0}, {0, 0}};
    operation.pads_same = pads_same;
  }

  // Append an operation on each element: "combine", act(x + added) - subtracted.
  void add_combination(int64_t out, Ints inputs, const std::string& function, double first, double second) {
    add(Operation::Kind::kCombine, out, std::move(inputs), function, first, second);
  }

  // Append act(x · scale + shift), of each channel.
  void add_affine(int64_t out, int64_t input, const Tensor& scale, const Tensor& shift, const std::string& function, double first,
                  double second) {
    Operation& operation = add(Operation::Kind::kAffine, out, {input}, function, first, second);
    operation.scale = copy(scale);
    operation.shift = copy(shift);
  }

  // Append the layer normalisation of the channels of each position.
  void add_normalization(int64_t out, int64_t input, const Tensor& scale, const Tensor& shift, double epsilon) {
    Operation& operation = add(Operation::Kind::kNormalize, out, {input}, "none", 0, 0);
    operation.scale = copy(scale);
    operation.shift = copy(shift);
    operation.epsilon = epsilon;
  }

  void add_average(int64_t out, int64_t input) { add(Operation::Kind::kAverage, out, {input}, "none", 0, 0); }

  // Append x · factors, (n, C, 1, 1).
  void add_scaling(int64_t out, int64_t input, int64_t factors) {
    add(Operation::Kind::kScale, out, {input, factors}, "none", 0, 0);
  }

  // (n, C, H, W) -> a map with channels last. The last operation gives the result; without operations it is `x`.
  //
  // Some samples at a time go through all operations, so that their maps stay in the cache; each thread takes others.
  Tensor run(const Tensor& given) const {
    const Tensor x = given.contiguous(at::MemoryFormat::ChannelsLast);
    if (operations.empty()) return x;
    const int64_t samples = x.size(0), threads = at::get_num_threads();
    std::vector<Map> forms(registers);
    forms[0] = form(x);
    int64_t widest = 1;
    for (const Operation& operation : operations) {
      const Map& map = forms[operation.out] = operation.infer(forms[operation.inputs[0]]);
      widest = std::max(widest, map[0] * map[1] * map[2]);
    }
    const Tensor out = empty_map(samples, forms[operations.back().out], x);
    const int64_t share = samples < threads ? samples : (samples + threads - 1) / threads;
    const int64_t part = std::max<int64_t>(std::min(kCacheBytes / 4 / widest, share), 1);
    const int64_t parts = (samples + part - 1) / part;
    if (parts == 1) {
      run_part(x, out, forms);
      return out;
    }
    const bool is_inference = c10::InferenceMode::is_enabled();  // threads do not know the caller's modes
    at::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
      c10::InferenceMode mode(is_inference);
      at::NoGradGuard guard;
      for (int64_t index = begin; index < end; ++index) {
        const int64_t first = index * part, size = std::min(part, samples - first);
        run_part(x.narrow(0, first, size), out.narrow(0, first, size), forms);
      }
    });
    return out;
  }

 private:
  Operation& add(Operation::Kind kind, int64_t out, Ints inputs, const std::string& function, double first, double second) {
    operations.emplace_back();
    Operation& operation = operations.back();
    operation.kind = kind;
    operation.out = out;
    operation.inputs = std::move(inputs);
    operation.activation = {find_function(function), static_cast<float>(first), static_cast<float>(second)};
    registers = std::max(registers, out + 1);
    last_reader.resize(registers, -1);
    for (int64_t input : operation.inputs) {
      if (input >= 0) last_reader[input] = operations.size() - 1;
    }
    return operation;
  }

  static Floats copy(const Tensor& values) {
    const Tensor given = values.contiguous();
    return Floats(given.const_data_ptr<float>(), given.const_data_ptr<float>() + given.numel());
  }

  void run_part(const Tensor& x, const Tensor& out, const std::vector<Map>& forms) const {
    std::vector<Tensor> values(registers);
    values[0] = x;
    for (size_t index = 0; index < operations.size(); ++index) {
      const Operation& operation = operations[index];
      const bool is_last = index + 1 == operations.size();
      values[operation.out] = is_last ? out : empty_map(x.size(0), forms[operation.out], x);
      operation.run(values, values[operation.out]);
      for (int64_t input : operation.inputs) {
        if (input >= 0 && last_reader[input] == static_cast<int64_t>(index)) values[input] = Tensor();
      }
    }
  }

  std::vector<Operation> operations;
  std::vector<int64_t> last_reader = {-1};
  int64_t registers = 1;
};

}  // namespace dgnet
