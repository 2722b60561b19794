// The sparse mode of a stage on the CPU in float32: predictions (Eq. 4), which blocks run (Eq. 5), and sums (Eq. 3).
//
// dgnet.inference._sparse (SparseWalk) and dgnet.graph define the results; the tests compare both.
// Letters: B samples, N nodes, E edges of a node, C channels.

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/custom_class.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <vector>

#include "program.h"

namespace {

using dgnet::grain;
using dgnet::Ints;
using dgnet::kGrain;
using dgnet::Program;
using at::Tensor;
using Tensors = std::vector<std::optional<Tensor>>;
using Nodes = Ints;

constexpr int64_t kChunk = 2048;       // elements of a sum that are computed together: they stay in the level 1 cache
constexpr int64_t kChannelBlock = 64;  // channels that one task pools
constexpr int64_t kPositions = 64;     // positions of a map that are summed together before they are added to the total
constexpr float kEpsilon = 1e-5f;      // of the layer normalisation of pooled features

float sigmoid(float x) { return 1 / (1 + std::exp(-x)); }

struct Term {
  const float* values;
  float weight;
};

// out = Σ weight · values over terms[0 … count); with `relu`, negative sums become 0.
void sum_terms(float* __restrict out, int64_t size, const Term* terms, size_t count, bool relu) {
  if (count == 0) {
    std::fill(out, out + size, 0.0f);
    return;
  }
  const float first = terms[0].weight;
  for (int64_t k = 0; k < size; ++k) out[k] = first * terms[0].values[k];
  for (size_t t = 1; t < count; ++t) {
    const float* __restrict values = terms[t].values;
    const float weight = terms[t].weight;
    for (int64_t k = 0; k < size; ++k) out[k] += weight * values[k];
  }
  if (relu) {
    for (int64_t k = 0; k < size; ++k) out[k] = out[k] < 0 ? 0 : out[k];  // NaN stays, as in torch.relu
  }
}

// The sums of the channels `begin` to `end` (exclusive, at most kChannelBlock of them) of one sample.
void sum_channels(float* __restrict out, const float* __restrict map, int64_t channels, int64_t area, int64_t begin,
                  int64_t end, bool channels_last) {
  if (channels_last) {
    std::fill(out + begin, out + end, 0.0f);
    for (int64_t start = 0; start < area; start += kPositions) {  // in parts: one long sum would round more
      float part[kChannelBlock] = {};
      for (int64_t position = start; position < std::min(start + kPositions, area); ++position) {
        const float* __restrict at = map + position * channels + begin;
        for (int64_t c = 0; c < end - begin; ++c) part[c] += at[c];
      }
      for (int64_t c = begin; c < end; ++c) out[c] += part[c - begin];
    }
    return;
  }
  for (int64_t c = begin; c < end; ++c) {
    const float* __restrict at = map + c * area;
    float lanes[16] = {};
    int64_t position = 0;
    for (; position + 16 <= area; position += 16) {
      for (int lane = 0; lane < 16; ++lane) lanes[lane] += at[position + lane];
    }
    float total = 0;
    for (float lane : lanes) total += lane;
    for (; position < area; ++position) total += at[position];
    out[c] = total;
  }
}

float dot(const float* __restrict a, const float* __restrict b, int64_t size) {
  float lanes[16] = {};
  int64_t k = 0;
  for (; k + 16 <= size; k += 16) {
    for (int lane = 0; lane < 16; ++lane) lanes[lane] += a[k + lane] * b[k + lane];
  }
  float total = 0;
  for (float lane : lanes) total += lane;
  for (; k < size; ++k) total += a[k] * b[k];
  return total;
}

// Layer normalisation without parameters.
std::vector<float> normalize(const float* values, int64_t size) {
  double sum = 0, squares = 0;
  for (int64_t k = 0; k < size; ++k) sum += values[k];
  const double mean = sum / size;
  for (int64_t k = 0; k < size; ++k) squares += (values[k] - mean) * (values[k] - mean);
  const double factor = 1 / std::sqrt(squares / size + kEpsilon);
  std::vector<float> normed(size);
  for (int64_t k = 0; k < size; ++k) normed[k] = static_cast<float>((values[k] - mean) * factor);
  return normed;
}

// How a weight follows from what routers predict; the weightings in dgnet.graph define them.
enum class Form {
  kAlpha,     // ψ(α) or α, of a fixed, learned or routed edge; times a static weight of a signed one
  kTanh,      // a static weight plus a · tanh(z)
  kIdentity,  // a static weight plus a · z
  kSoftmax,   // E · softmax(z)
};

// The constants of a stage, which are the same in all forward passes.
struct Stage : torch::CustomClassHolder {
  Stage(std::vector<Nodes> senders, Nodes entry, std::vector<std::optional<double>> pinned, std::vector<Nodes> free_receivers,
        std::vector<Nodes> gated_receivers, Tensors shared_alpha, Tensors router_weights, Tensors router_biases,
        Tensors gate_columns, std::optional<Tensor> threshold, std::optional<Tensor> gate_bias, bool is_psi, bool is_raw,
        double unit, Tensors start_weights, bool norms_routers, bool norms_gates, Tensors static_weights, int64_t form,
        double scale, double temperature)
      : senders(std::move(senders)),
        pinned(std::move(pinned)),
        free_receivers(std::move(free_receivers)),
        gated_receivers(std::move(gated_receivers)),
        shared_alpha(std::move(shared_alpha)),
        router_weights(std::move(router_weights)),
        router_biases(std::move(router_biases)),
        gate_columns(std::move(gate_columns)),
        threshold(std::move(threshold)),
        gate_bias(std::move(gate_bias)),
        is_psi(is_psi),
        is_raw(is_raw),
        unit(static_cast<float>(unit)),
        start_weights(std::move(start_weights)),
        norms_routers(norms_routers),
        norms_gates(norms_gates),
        static_weights(std::move(static_weights)),
        form(static_cast<Form>(form)),
        scale(static_cast<float>(scale)),
        temperature(static_cast<float>(temperature)),
        is_entry(this->senders.size(), false),
        last_receiver(this->senders.size(), 0),
        blocks(this->senders.size()) {
    for (int64_t node : entry) is_entry[node] = true;
    for (size_t node = 0; node < this->senders.size(); ++node) {
      for (int64_t sender : this->senders[node]) last_receiver[sender] = node;
    }
  }

  bool runs_blocks() const { return blocks.size() > 1 && blocks[1].defined(); }

  // What a node computes, f_j.
  void set_block(int64_t node, c10::intrusive_ptr<Program> program) { blocks[node] = std::move(program); }

  const std::vector<Nodes> senders;
  const std::vector<std::optional<double>> pinned;  // of each receiving node: the weight of its in-edges, if pinned
  const std::vector<Nodes> free_receivers, gated_receivers;
  const Tensors shared_alpha;  // of each receiving node: α of its in-edges, (E,), if features are not read
  const Tensors router_weights, router_biases, gate_columns;  // of each sending node
  const std::optional<Tensor> threshold, gate_bias;
  const bool is_psi, is_raw;
  const float unit;                       // weights of routed edges are divided by it
  const Tensors start_weights;            // of each receiving node, (E,): what is subtracted after that, or nothing
  const bool norms_routers, norms_gates;  // whether they read pooled features normalised
  const Tensors static_weights;           // of each receiving node, (E,), or nothing
  const Form form;
  const float scale;        // a
  const float temperature;  // of a soft gate on |w|; 0: none
  std::vector<bool> is_entry;
  std::vector<int64_t> last_receiver;  // of each node: after this node its feature is no longer needed
  std::vector<c10::intrusive_ptr<Program>> blocks;  // of each node, if the extension computes them
};

// One forward pass of a stage. For each node the caller takes its input, runs its block, and puts its feature.
struct Walk : torch::CustomClassHolder {
  // `x`: the raw stage input; `imposed`: (1 or B, N, N) weights instead of the stage's own. Edges close below
  // τ + `offset`, gates below `least_logit`.
  Walk(c10::intrusive_ptr<Stage> given, Tensor x, std::optional<Tensor> imposed, double offset, double least_logit)
      : stage(std::move(given)),
        samples(x.size(0)),
        nodes(static_cast<int64_t>(stage->senders.size())),
        format(stage->runs_blocks() || x.is_contiguous(at::MemoryFormat::ChannelsLast) ? at::MemoryFormat::ChannelsLast
                                                                                       : at::MemoryFormat::Contiguous),
        raw(x.contiguous(format)),
        offset(static_cast<float>(offset)),
        least_logit(static_cast<float>(least_logit)),
        alpha(samples * nodes * nodes, 0),
        weights(samples * nodes * nodes, 0),
        ran(samples * nodes, 0),
        alive(samples * nodes, 0),
        logits(samples * nodes, 0),
        features(nodes),
        places(samples * nodes, -1),
        rows(nodes) {
    if (imposed) impose(imposed->to(x.options()).expand({samples, nodes, nodes}).contiguous());
    if (stage->gate_bias) {
      for (int64_t b = 0; b < samples; ++b) {
        std::copy_n(stage->gate_bias->const_data_ptr<float>(), nodes, logits.data() + b * nodes);
      }
    }
    for (int64_t b = 0; b < samples; ++b) mark_run(0, b);
  }

  // x̂ of a node for the samples for which it runs, (n, C, H, W): the weighted sum of its senders' features, or, for an entry
  // node, the weighted raw input. The output node has all samples. Nothing if none of its senders has run.
  std::optional<Tensor> take(int64_t node, bool relu) {
    const bool is_output = node == nodes - 1;
    if (is_imposed) {
      gather_rows(node, is_output);
    } else {
      decide(node, is_output);
    }
    release(node - 1);
    return sum(node, stage->is_entry[node], relu);
  }

  // The output node's x̂ from the input node's feature, for a stage whose blocks were added to its constants.
  std::optional<Tensor> run(Tensor feature, bool relu) {
    put(0, std::move(feature));
    for (int64_t node = 1; node < nodes - 1; ++node) {
      std::optional<Tensor> x = take(node, relu && !stage->is_entry[node]);
      if (!x || x->size(0) == 0) continue;
      put(node, stage->blocks[node]->run(*x));
    }
    return take(nodes - 1, relu);
  }

  // Add votes for the gates of all blocks, (B, blocks), which were predicted outside the stage, to their logits.
  void vote(const Tensor& votes) {
    const float* vote = votes.const_data_ptr<float>();
    for (int64_t b = 0; b < samples; ++b) {
      for (int64_t node = 1; node < nodes - 1; ++node) logits[b * nodes + node] += *vote++;
    }
  }

  // The weighted shortcut of an entry node, from the input node's feature, for the samples for which it runs.
  std::optional<Tensor> take_shortcut(int64_t node) { return sum(node, false, false); }

  // Store the feature of a node, for the samples for which it runs, and predict its out-edges from it.
  void put(int64_t node, Tensor feature) {
    TORCH_CHECK(feature.dim() == 4, "a block writes (B, C, H, W), got ", feature.sizes());
    TORCH_CHECK(feature.size(0) == static_cast<int64_t>(rows[node].size()), "a block was given ", rows[node].size(),
                " samples and wrote ", feature.size(0));
    features[node] = feature.to(at::kFloat).contiguous(format);
    for (size_t row = 0; row < rows[node].size(); ++row) places[node * samples + rows[node][row]] = row;
    if (!is_imposed) predict(node);
  }

  Tensor get_alpha() { return at::tensor(alpha).view({samples, nodes, nodes}); }
  Tensor get_weights() { return at::tensor(weights).view({samples, nodes, nodes}); }
  Tensor get_ran() { return at::tensor(ran).view({samples, nodes}).to(at::kBool); }

 private:
  // Use the imposed weights, also as α; an edge that weighs 0 is closed. Nothing is predicted.
  void impose(const Tensor& imposed) {
    is_imposed = true;
    const float* given = imposed.const_data_ptr<float>();
    for (int64_t b = 0; b < samples; ++b) {
      uint8_t* is_alive = alive.data() + b * nodes;
      is_alive[0] = 1;
      for (int64_t node = 1; node < nodes; ++node) {
        for (int64_t sender : stage->senders[node]) {
          const int64_t at = (b * nodes + node) * nodes + sender;
          const float weight = is_alive[sender] ? given[at] : 0;
          alpha[at] = weights[at] = weight;
          is_alive[node] |= weight != 0;
        }
      }
    }
    find_needed();
  }

  // For which samples each node has an open path to the output node, from known weights (as DenseWalk.find_needed).
  void find_needed() {
    needed.assign(samples * nodes, 0);
    for (int64_t b = 0; b < samples; ++b) {
      uint8_t* is_needed = needed.data() + b * nodes;
      is_needed[nodes - 1] = 1;
      for (int64_t node = nodes - 1; node > 0; --node) {
        if (!is_needed[node]) continue;
        for (int64_t sender : stage->senders[node]) {
          is_needed[sender] |= weights[(b * nodes + node) * nodes + sender] != 0;
        }
      }
    }
  }

  void mark_run(int64_t node, int64_t sample) {
    alive[sample * nodes + node] = 1;
    ran[sample * nodes + node] = 1;
    rows[node].push_back(sample);
  }

  void gather_rows(int64_t node, bool is_output) {
    for (int64_t b = 0; b < samples; ++b) {
      const int64_t at = b * nodes + node;
      if (is_output || (alive[at] && needed[at])) mark_run(node, b);
    }
  }

  // Which in-edges of a node are open, what they weigh, and for which samples the node runs (Eq. 5, §3.3).
  void decide(int64_t node, bool is_output) {
    const Nodes& senders = stage->senders[node];
    const std::optional<double> pin = stage->pinned[node];
    const bool is_gated = stage->gate_bias.has_value() && !is_output;
    const bool has_threshold = stage->threshold.has_value() && !pin;
    const float tau = has_threshold ? stage->threshold->const_data_ptr<float>()[node] : 0;
    const float least = tau + offset;
    const float* shared = stage->shared_alpha[node] ? stage->shared_alpha[node]->const_data_ptr<float>() : nullptr;
    const auto& start_weights = stage->start_weights[node];
    const float* starts = start_weights ? start_weights->const_data_ptr<float>() : nullptr;
    const auto& static_weights = stage->static_weights[node];
    const float* statics = static_weights && !pin ? static_weights->const_data_ptr<float>() : nullptr;
    const bool is_bounded = stage->form == Form::kAlpha || pin;
    is_open.assign(samples * senders.size(), 0);
    for (int64_t b = 0; b < samples; ++b) {
      const bool is_gate_open = !is_gated || logits[b * nodes + node] >= least_logit;
      bool is_alive = false;
      const double normalizer = stage->form == Form::kSoftmax ? find_normalizer(b, node) : 0;
      for (size_t edge = 0; edge < senders.size(); ++edge) {
        const int64_t sender = senders[edge], at = (b * nodes + node) * nodes + sender;
        if (!alive[b * nodes + sender]) {
          alpha[at] = 0;
          continue;
        }
        const float value = pin ? static_cast<float>(*pin) : shared ? shared[edge] : alpha[at];
        alpha[at] = value;
        float compared = value, weight;
        if (is_bounded) {
          weight = has_threshold && stage->is_psi && !stage->is_raw ? value * sigmoid(value - tau) : value;
          if (!pin && stage->unit != 1) weight /= stage->unit;
          if (!pin && starts != nullptr) weight -= starts[edge];
          if (statics != nullptr) weight *= statics[edge];
        } else {
          weight = stage->form == Form::kSoftmax ? static_cast<float>(std::exp(value - normalizer)) : statics[edge] + value;
          compared = std::abs(weight);
          if (stage->temperature != 0) weight *= sigmoid((compared - tau) / stage->temperature);
        }
        if (!is_gate_open || (has_threshold && !(compared >= least))) continue;
        is_alive = is_open[b * senders.size() + edge] = 1;
        weights[at] = weight;
      }
      if (is_alive || is_output) mark_run(node, b);
    }
  }

  // log(Σ exp(α) / E) over the E in-edges of a node; α of a dead sender counts as 0.
  double find_normalizer(int64_t sample, int64_t node) const {
    const Nodes& senders = stage->senders[node];
    std::vector<double> values;
    for (int64_t sender : senders) {
      values.push_back(alive[sample * nodes + sender] ? alpha[(sample * nodes + node) * nodes + sender] : 0);
    }
    const double largest = *std::max_element(values.begin(), values.end());
    double sum = 0;
    for (double value : values) sum += std::exp(value - largest);
    return largest + std::log(sum / senders.size());
  }

  // What a router predicts from z = Wᵀφ + b: σ(z) (Eq. 4), or the part of a weight that depends on the image.
  float activate(float z) const {
    switch (stage->form) {
      case Form::kTanh:
        return stage->scale * std::tanh(z);
      case Form::kIdentity:
        return stage->scale * z;
      case Form::kSoftmax:
        return z;
      default:
        return sigmoid(z);
    }
  }

  // α of the out-edges, and votes for block gates, added to their logits.
  void predict(int64_t node) {
    const auto& router = stage->router_weights[node];
    const auto& columns = stage->gate_columns[node];
    if (!router && !columns) return;
    const Tensor& feature = features[node];
    const int64_t count = feature.size(0), channels = feature.size(1), area = feature.size(2) * feature.size(3);
    const bool is_last = format == at::MemoryFormat::ChannelsLast;
    for (const auto& weight : {router, columns}) {
      TORCH_CHECK(!weight || weight->size(1) == channels, "node ", node, " has ", channels, " channels, its router reads ",
                  weight ? weight->size(1) : 0);
    }
    const float* maps = feature.const_data_ptr<float>();
    std::vector<float> pooled(count * channels);
    const int64_t blocks = (channels + kChannelBlock - 1) / kChannelBlock;
    at::parallel_for(0, count * blocks, grain(area * kChannelBlock), [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        const int64_t row = task / blocks, channel = task % blocks * kChannelBlock;
        sum_channels(pooled.data() + row * channels, maps + row * channels * area, channels, area, channel,
                     std::min(channel + kChannelBlock, channels), is_last);
      }
    });
    const Nodes &routed = stage->free_receivers[node], &gated = stage->gated_receivers[node];
    const float* weight = router ? router->const_data_ptr<float>() : nullptr;
    const float* bias = router && stage->router_biases[node] ? stage->router_biases[node]->const_data_ptr<float>() : nullptr;
    const float* column = columns ? columns->const_data_ptr<float>() : nullptr;
    const int64_t work = channels * static_cast<int64_t>(routed.size() + gated.size());
    at::parallel_for(0, count, grain(work), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        const int64_t sample = rows[node][row];
        float* mean = pooled.data() + row * channels;
        for (int64_t c = 0; c < channels; ++c) mean[c] /= area;
        std::vector<float> normed;
        if (stage->norms_routers || stage->norms_gates) normed = normalize(mean, channels);
        const float* for_router = stage->norms_routers ? normed.data() : mean;
        const float* for_gate = stage->norms_gates ? normed.data() : mean;
        for (size_t edge = 0; weight != nullptr && edge < routed.size(); ++edge) {
          alpha[(sample * nodes + routed[edge]) * nodes + node] =
              activate(dot(for_router, weight + edge * channels, channels) + (bias == nullptr ? 0 : bias[edge]));
        }
        for (size_t edge = 0; column != nullptr && edge < gated.size(); ++edge) {
          logits[sample * nodes + gated[edge]] += dot(for_gate, column + edge * channels, channels);
        }
      }
    });
  }

  // Σ_i w_ij x_i over the open in-edges of a node (Eq. 3), (n, C, H, W), or w · raw input; nothing if no sender has run.
  std::optional<Tensor> sum(int64_t node, bool reads_raw, bool relu) {
    const Nodes& senders = stage->senders[node];
    const int64_t count = static_cast<int64_t>(rows[node].size());
    const Tensor* like = reads_raw ? &raw : nullptr;
    for (size_t edge = 0; like == nullptr && edge < senders.size(); ++edge) {
      const Tensor& feature = features[senders[edge]];
      if (feature.defined()) like = &feature;
    }
    if (like == nullptr) return std::nullopt;
    for (size_t edge = 0; !reads_raw && edge < senders.size(); ++edge) {
      const Tensor& feature = features[senders[edge]];
      TORCH_CHECK(!feature.defined() || feature.sizes().slice(1) == like->sizes().slice(1), "what node ", node,
                  " sums has different shapes: ", feature.sizes(), " and ", like->sizes());
    }
    std::vector<Term> terms;
    std::vector<size_t> starts{0};
    const int64_t size = like->numel() / std::max<int64_t>(like->size(0), 1);
    for (int64_t row = 0; row < count; ++row) {
      const int64_t sample = rows[node][row];
      for (size_t edge = 0; edge < senders.size(); ++edge) {
        const int64_t sender = senders[edge], at = (sample * nodes + node) * nodes + sender;
        const bool passes = is_imposed ? weights[at] != 0 : is_open[sample * senders.size() + edge];
        if (!passes) continue;
        const float* from = reads_raw ? raw.const_data_ptr<float>() + sample * size
                                      : features[sender].const_data_ptr<float>() + places[sender * samples + sample] * size;
        terms.push_back({from, weights[at]});
      }
      starts.push_back(terms.size());
    }
    std::vector<int64_t> shape = like->sizes().vec();
    shape[0] = count;
    Tensor out = at::empty(shape, like->options(), format);
    float* const to = out.mutable_data_ptr<float>();
    const int64_t chunks = (size + kChunk - 1) / kChunk;
    at::parallel_for(0, count * chunks, grain(kChunk), [&](int64_t begin, int64_t end) {
      std::vector<Term> moved;
      for (int64_t task = begin; task < end; ++task) {
        const int64_t row = task / chunks, from = task % chunks * kChunk;
        moved.assign(terms.begin() + starts[row], terms.begin() + starts[row + 1]);
        for (Term& term : moved) term.values += from;
        sum_terms(to + row * size + from, std::min(kChunk, size - from), moved.data(), moved.size(), relu);
      }
    });
    return out;
  }

  // Free the features that no later node reads.
  void release(int64_t before) {
    for (int64_t node = 0; node <= before; ++node) {
      if (stage->last_receiver[node] <= before) features[node] = Tensor();
    }
  }

  const c10::intrusive_ptr<Stage> stage;
  const int64_t samples, nodes;
  const at::MemoryFormat format;
  const Tensor raw;
  const float offset;
  const float least_logit;
  std::vector<float> alpha, weights;        // (B, N, N)
  std::vector<uint8_t> ran, alive, needed;  // (B, N)
  std::vector<float> logits;                // (B, N), of the gates
  std::vector<uint8_t> is_open;             // (B, E), of the node whose input was last taken
  std::vector<Tensor> features;             // of each node, (n, C, H, W)
  std::vector<int64_t> places;              // (N, B): the row of each sample in them
  std::vector<Ints> rows;                   // of each node: the samples for which it runs, ascending
  bool is_imposed = false;
};

TORCH_LIBRARY(dgnet, library) {
  library.class_<Program>("Program")
      .def(torch::init<>())
      .def("add_convolution", &Program::add_convolution)
      .def("add_combination", &Program::add_combination)
      .def("add_affine", &Program::add_affine)
      .def("add_normalization", &Program::add_normalization)
      .def("add_average", &Program::add_average)
      .def("add_scaling", &Program::add_scaling)
      .def("run", &Program::run);
  library.class_<Stage>("Stage")
      .def(torch::init<std::vector<Nodes>, Nodes, std::vector<std::optional<double>>, std::vector<Nodes>, std::vector<Nodes>,
                       Tensors, Tensors, Tensors, Tensors, std::optional<Tensor>, std::optional<Tensor>, bool, bool, double,
                       Tensors, bool, bool, Tensors, int64_t, double, double>())
      .def("set_block", &Stage::set_block);
  library.class_<Walk>("Walk")
      .def(torch::init<c10::intrusive_ptr<Stage>, Tensor, std::optional<Tensor>, double, double>())
      .def("run", &Walk::run)
      .def("take", &Walk::take)
      .def("take_shortcut", &Walk::take_shortcut)
      .def("put", &Walk::put)
      .def("vote", &Walk::vote)
      .def("alpha", &Walk::get_alpha)
      .def("weights", &Walk::get_weights)
      .def("ran", &Walk::get_ran);
}

}  // namespace
