// The Python side. Tensors come as addresses, because asking a tensor for more costs microseconds: gossamer.kernels and
// gossamer.native check types, shapes and strides, and keep the tensors alive, before they pass an address on.
#include <nanobind/nanobind.h>
#include <nanobind/stl/map.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <cstring>
#include <stdexcept>
#include <type_traits>
#include <utility>

#include "products/gaussian_products.h"
#include "products/gradient_products.h"
#include "runtime/program.h"
#include "runtime/threads.h"
#include "runtime/weight.h"

namespace nb = nanobind;
using namespace gossamer;

namespace {

template <class T>
T* at(int64_t address) {
  return reinterpret_cast<T*>(address);
}

Type type_of(const std::string& name) {
  if (name == "int8") return Type::int8;
  if (name == "bfloat16") return Type::bf16;
  if (name == "float32") return Type::f32;
  if (name == "float16") return Type::fp16;
  if (name == "int8_blocks") return Type::int8_blocks;
  throw std::invalid_argument("unknown type " + name);
}

Activation activation_of(const std::string& name) {
  if (name.empty()) return Activation::none;
  if (name == "silu") return Activation::silu;
  if (name == "gelu_tanh") return Activation::gelu_tanh;
  if (name == "gelu") return Activation::gelu;
  if (name == "relu") return Activation::relu;
  if (name == "relu_squared") return Activation::relu_squared;
  if (name == "clamped") return Activation::clamped;
  throw std::invalid_argument("unknown activation " + name);
}

const Kernels& kernels_of(const std::string& name) {
  for (const Kernels* const* each = available(); *each; ++each)
    if (name == (*each)->name) return **each;
  throw std::invalid_argument("this processor, or this build, has no " + name);
}

std::vector<std::string> names() {
  std::vector<std::string> all;
  for (const Kernels* const* each = available(); *each; ++each) all.emplace_back((*each)->name);
  return all;
}

Decomposition decomposition(const std::string& extent, bool relative, float threshold, int64_t columns) {
  const Extent kind = extent == "token" ? Extent::token : extent == "static" ? Extent::columns : Extent::none;
  return {kind, relative, threshold, at<const uint8_t>(columns)};
}

// A pointer of a step as an attribute that takes and gives an address.
template <auto FIELD>
void address(nb::class_<StepInput>& step, const char* name) {
  using Pointer = std::remove_reference_t<decltype(std::declval<StepInput&>().*FIELD)>;
  step.def_prop_rw(
      name, [](const StepInput& self) { return reinterpret_cast<int64_t>(self.*FIELD); },
      [](StepInput& self, int64_t value) { self.*FIELD = reinterpret_cast<Pointer>(value); });
}

// What a row asks for; columns of n entries.
struct Draws {
  const int64_t* row;
  const float *peak, *temperature;
  const int64_t* top_k;
  const double* top_p;
  const float* min_p;
  const double* uniform;
};

// One token for each of n rows of logits (B, V).
void sample(const Kernels& kernels, const float* logits, int64_t vocabulary, int64_t n, const Draws& draws, int64_t* tokens,
            int threads) {
  if (n <= 1) threads = 1;  // but two rows start all: OpenMP ends the threads that a smaller team leaves out
  const int64_t doubles = (sample_scratch(vocabulary) + 7) / 8 + 8;
  // Kept, since having the system map as many pages in each step costs more than the rest.
  thread_local std::vector<double> kept;
  if (static_cast<int64_t>(kept.size()) < doubles * threads) kept.resize(doubles * threads);
  double* scratch = kept.data();
  Phase rows;
  run_parallel(threads, [&](int index) {
    rows.run(n, 1, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        tokens[i] = kernels.sample({logits + draws.row[i] * vocabulary, vocabulary, draws.peak[i], draws.temperature[i],
                                    draws.top_k[i], draws.top_p[i], draws.min_p[i], draws.uniform[i], scratch + doubles * index});
      }
    });
  });
}

}  // namespace

NB_MODULE(_native, m) {
  m.doc() = "Native kernels; see gossamer.kernels.";
  m.def("instruction_sets", &names);

  nb::class_<Weight>(m, "Weight")
      .def("__init__", [](Weight* self, const std::string& isa, const std::string& type, int64_t n, int64_t k, bool bias,
                          int64_t stored, const std::string& stored_type, bool for_now) {
        new (self) Weight(kernels_of(isa), format_of(type_of(type)), n, k, bias, stored, type_of(stored_type), for_now);
      })
      // In blocks: the type of each 16 outputs, as csrc/kernels/block_types.h numbers them.
      .def_static("of_blocks", [](const std::string& isa, const std::vector<int>& types, int64_t n, int64_t k, bool bias) {
        std::vector<BlockType> each;
        for (const int type : types) each.push_back(static_cast<BlockType>(type));
        return std::make_shared<Weight>(kernels_of(isa), each, n, k, bias);
      })
      .def_static("of_rows", [](const std::string& isa, int type, int64_t n, int64_t k, int64_t rows) {
        return std::make_shared<Weight>(kernels_of(isa), static_cast<BlockType>(type), n, k, at<const uint8_t>(rows));
      })
      .def("pack_blocks", [](Weight& self, int64_t source, int64_t rows, int64_t first, int64_t part, int64_t parts, int threads) {
        nb::gil_scoped_release release;
        self.pack_blocks(at<const uint8_t>(source), rows, first, part, parts, threads);
      })
      .def("look_up", [](Weight& self, int64_t row, int64_t out) {
        const PackedWeight& w = self.packed();
        if (row < 0 || row >= w.n) throw std::invalid_argument("there is no such row");
        self.kernels().of(w.format).look_up(w, row, 1.0f, at<float>(out));
      })
      .def("pack", [](Weight& self, int64_t source, const std::string& type, int64_t rows, int64_t first, int64_t part,
                      int64_t parts, int64_t scale) {
        const Type from = type_of(type);
        nb::gil_scoped_release release;
        self.pack(at<const void>(source), from, rows, first, part, parts, at<const float>(scale));
      })
      .def("set_bias", [](Weight& self, int64_t bias, int64_t rows, int64_t first, int64_t part, int64_t parts) {
        self.set_bias(at<const float>(bias), rows, first, part, parts);
      })
      .def("set_store", [](Weight& self, int64_t columns, int64_t store, int64_t rows, int64_t first, int64_t part, int64_t parts) {
        self.set_store(at<const int64_t>(columns), at<const uint16_t>(store), rows, first, part, parts);
      })
      .def("multiply", [](Weight& self, int64_t x, int64_t rows, int64_t y, const std::string& outliers, bool relative,
                          float threshold, int64_t columns, int threads) {
        const bool whole = outliers == "batch";
        const Decomposition rule = decomposition(whole ? "token" : outliers, relative, threshold, columns);
        nb::gil_scoped_release release;
        self.multiply(at<const float>(x), rows, at<float>(y), rule, whole, threads);
      })
      .def("drop_zeros", &Weight::drop_zeros, nb::call_guard<nb::gil_scoped_release>())
      .def("copy", &Weight::copy, nb::call_guard<nb::gil_scoped_release>())
      .def_prop_rw(
          "few_rows", [](Weight& self) { return self.packed().few_rows; },
          [](Weight& self, int64_t rows) { self.packed().few_rows = rows; })
      .def_prop_ro("bytes", &Weight::bytes);

  // One task of attention, on this thread.
  m.def("attend", [](const std::string& isa, const std::string& type, int64_t dim, int64_t q, int64_t q_stride, int64_t tokens,
                     int64_t positions, int64_t rows, int64_t group, int64_t head, int64_t keys, int64_t values, int64_t n,
                     int64_t start, int64_t window, int64_t out, int64_t state, int64_t heads) {
    if (rows * group > ATTENTION_ROWS) throw std::invalid_argument("a task has too many rows");
    AttentionTask task{type_of(type), dim, at<const void>(q), q_stride, at<const int32_t>(tokens), at<const int64_t>(positions),
                       rows, group, head, at<const void>(keys), at<const void>(values), n, start, window, at<float>(out),
                       heads * dim, at<float>(state), heads * 2, nullptr};
    std::vector<uint8_t> scratch(attention_scratch(dim) + 64);
    task.scratch = scratch.data();
    nb::gil_scoped_release release;
    kernels_of(isa).attend(task);
  });
  // The same within a tolerance; see attention_within.h.
  m.def("attend_within", [](const std::string& isa, const std::string& type, int64_t dim, int64_t q, int64_t q_stride,
                            int64_t tokens, int64_t positions, int64_t rows, int64_t group, int64_t head, int64_t keys,
                            int64_t values, int64_t n, int64_t out, int64_t state, int64_t heads, int64_t mean_keys,
                            int64_t mean_values, int64_t spread, int64_t blocks, float threshold, float gain, int64_t check,
                            int64_t report) {
    if (rows * group > ATTENTION_ROWS) throw std::invalid_argument("a task has too many rows");
    AttentionTask task{type_of(type), dim, at<const void>(q), q_stride, at<const int32_t>(tokens), at<const int64_t>(positions),
                       rows, group, head, at<const void>(keys), at<const void>(values), n, 0, 0, at<float>(out),
                       heads * dim, at<float>(state), heads * 2, nullptr};
    Memory scratch(attention_scratch(dim) + 64), chosen(means_scratch(dim, blocks));
    task.scratch = scratch.as<uint8_t>();
    const KeyMeans means{at<const void>(mean_keys), at<const void>(mean_values), at<const float>(spread), blocks, threshold, gain,
                         chosen.as<float>(), check, at<double>(report)};
    nb::gil_scoped_release release;
    kernels_of(isa).attend_within(task, means);
  });
  // A key or value as int8 keys and values are stored: out kv_bytes(int8, n).
  m.def("quantize", [](const std::string& isa, int64_t x, int64_t n, int64_t out) {
    kernels_of(isa).quantize(at<const float>(x), n, at<uint8_t>(out));
  });
  m.def("argmax", [](const std::string& isa, int64_t x, int64_t n) { return kernels_of(isa).argmax(at<const float>(x), n); });
  m.def("sample", [](const std::string& isa, int64_t logits, int64_t vocabulary, int64_t n, int64_t row, int64_t peak,
                     int64_t temperature, int64_t top_k, int64_t top_p, int64_t min_p, int64_t uniform, int64_t tokens,
                     int threads) {
    const Kernels& kernels = kernels_of(isa);
    const Draws draws{at<const int64_t>(row), at<const float>(peak), at<const float>(temperature), at<const int64_t>(top_k),
                      at<const double>(top_p), at<const float>(min_p), at<const double>(uniform)};
    nb::gil_scoped_release release;
    sample(kernels, at<const float>(logits), vocabulary, n, draws, at<int64_t>(tokens), threads);
  });

  // Products with rows of gradients (m, d) of `type`; see gossamer.kernels.gradients.
  m.def("dot_rows", [](const std::string& isa, const std::string& type, int64_t rows, int64_t count, int64_t d, int64_t stride,
                       int64_t x, int64_t out, int threads) {
    const GradientRows g{type_of(type), at<const void>(rows), count, d, stride};
    const Kernels& kernels = kernels_of(isa);
    nb::gil_scoped_release release;
    dot_rows(kernels, g, at<const float>(x), at<double>(out), threads);
  });
  m.def("combine_rows", [](const std::string& isa, const std::string& type, int64_t rows, int64_t count, int64_t d, int64_t stride,
                           int64_t w, int64_t out, int threads) {
    const GradientRows g{type_of(type), at<const void>(rows), count, d, stride};
    const Kernels& kernels = kernels_of(isa);
    nb::gil_scoped_release release;
    combine_rows(kernels, g, at<const float>(w), at<float>(out), threads);
  });
  m.def("gram", [](const std::string& isa, const std::string& type, int64_t rows, int64_t count, int64_t d, int64_t stride,
                   int64_t out, int threads) {
    const GradientRows g{type_of(type), at<const void>(rows), count, d, stride};
    const Kernels& kernels = kernels_of(isa);
    nb::gil_scoped_release release;
    gram(kernels, g, at<double>(out), threads);
  });

  // Matrices of exponentials; see gossamer.kernels and gossamer.operators.gaussian. Addresses are of what csrc/products/gaussian_products.h describes.
  nb::class_<GaussianQueries>(m, "GaussianQueries")
      .def("__init__", [](GaussianQueries* self, int64_t rows, int64_t d, int64_t q, int64_t row, bool differences, int64_t tiles,
                          int64_t start) {
        new (self) GaussianQueries{rows, d, at<const float>(q), at<const float>(row), differences, tiles, at<const int64_t>(start)};
      });
  nb::class_<GaussianKeys>(m, "GaussianKeys")
      .def("__init__", [](GaussianKeys* self, int64_t panels, int64_t padded) {
        new (self) GaussianKeys{at<const float>(panels), padded};
      });
  nb::class_<GaussianSample>(m, "GaussianSample")
      .def("__init__", [](GaussianSample* self, const GaussianKeys& keys, int64_t x, int64_t share, int64_t square, int64_t block,
                          int64_t blocks, int64_t near, int64_t count, int64_t rate) {
        new (self) GaussianSample{keys, at<const float>(x), at<const float>(share), at<const float>(square), at<const int32_t>(block),
                                  blocks, at<const uint8_t>(near), at<const int64_t>(count), at<const double>(rate)};
      });
  m.def("gaussian_products", [](const std::string& isa, const GaussianQueries& queries, const GaussianKeys& keys, int64_t x,
                                int64_t columns, int64_t range_start, int64_t range, std::optional<GaussianSample> sample, int64_t y,
                                int64_t v, int threads) {
    const Kernels& kernels = kernels_of(isa);
    nb::gil_scoped_release release;
    gaussian_products(kernels, queries, keys, at<const float>(x), columns, at<const int64_t>(range_start), at<const int64_t>(range),
                      sample ? &*sample : nullptr, at<double>(y), at<double>(v), threads);
  });
  m.def("gaussian_sums", [](const std::string& isa, const GaussianQueries& queries, const GaussianKeys& keys, int64_t counted,
                            int64_t blocks, int64_t start, int64_t sums, int64_t squares, int threads) {
    const Kernels& kernels = kernels_of(isa);
    nb::gil_scoped_release release;
    gaussian_sums(kernels, queries, keys, at<const float>(counted), blocks, at<const int64_t>(start), at<double>(sums),
                  at<double>(squares), threads);
  });

  nb::class_<StepInput> step(m, "StepInput");
  step.def(nb::init<>())
      .def_rw("rows", &StepInput::rows)
      .def_rw("items", &StepInput::items)
      .def_rw("logit_rows", &StepInput::logit_rows)
      .def_rw("summaries", &StepInput::summaries)
      .def_rw("check", &StepInput::check)
      .def_rw("runs", &StepInput::runs)
      .def_rw("state_runs", &StepInput::state_runs)
      .def("attend_exactly", &StepInput::attend_exactly);
  address<&StepInput::tokens>(step, "tokens");
  address<&StepInput::positions>(step, "positions");
  address<&StepInput::place>(step, "place");
  address<&StepInput::target>(step, "target");
  address<&StepInput::item>(step, "item");
  address<&StepInput::item_rows>(step, "item_rows");
  address<&StepInput::logit_row>(step, "logit_row");
  address<&StepInput::tables>(step, "tables");
  address<&StepInput::run>(step, "run");
  address<&StepInput::state_run>(step, "state_run");
  address<&StepInput::logits>(step, "logits");
  address<&StepInput::best>(step, "best");
  address<&StepInput::within>(step, "within");
  address<&StepInput::summary>(step, "summary");
  address<&StepInput::report>(step, "report");
  nb::class_<Program>(m, "Program")
      .def("__init__", [](Program* self, const std::string& isa, int64_t heads, const std::vector<std::pair<int64_t, int64_t>>& layers,
                          const std::string& kv, int64_t max_rows, bool invariant) {
        Shape shape{heads, {}, type_of(kv), invariant};
        for (const auto& [kv_heads, dim] : layers) shape.layers.push_back({kv_heads, dim});
        new (self) Program(kernels_of(isa), std::move(shape), max_rows);
      })
      .def("buffer", &Program::buffer)
      .def("prepared", [](Program& self, const std::string& type, int64_t k, int64_t times) {
        return self.prepared(type_of(type), k, times);
      })
      .def("embed", &Program::embed)
      .def("embed_positions", &Program::embed_positions)
      .def("layer_norm", [](Program& self, int source, int64_t gain, int64_t bias, float epsilon, int64_t k, int to) {
        self.layer_norm(source, at<const float>(gain), at<const float>(bias), epsilon, k, to);
      })
      .def("glu", [](Program& self, int buffer, int64_t k, const std::string& by, bool sorted) {
        self.glu(buffer, k, activation_of(by), sorted);
      })
      .def("activate", [](Program& self, int buffer, int64_t k, const std::string& by) { self.activate(buffer, k, activation_of(by)); })
      .def("prepare", [](Program& self, int source, int64_t gain, float number, int64_t k, int64_t order, int to,
                         const std::string& outliers, bool relative, float threshold, int64_t columns, int which) {
        const bool whole = outliers == "batch";
        self.prepare(source, at<const float>(gain), number, k, at<const int64_t>(order), to,
                     decomposition(whole ? "token" : outliers, relative, threshold, columns), whole, static_cast<Rows>(which));
      })
      .def("linear", [](Program& self, std::shared_ptr<Weight> weight, int prepared, int to, bool add, const std::string& gate,
                        bool last, int addend) {
        self.linear(std::move(weight), prepared, to, add, activation_of(gate), last, addend);
      })
      .def("low_rank", &Program::low_rank)
      .def("route", [](Program& self, int source, int64_t experts, int64_t chosen, bool renormalize, float margin,
                       int64_t preference, int64_t factors) {
        self.route(source, experts, chosen, renormalize, margin, at<const float>(preference), at<const float>(factors));
      })
      .def("experts", [](Program& self, std::vector<std::shared_ptr<Weight>> weights, int prepared, int to, const std::string& gate) {
        self.experts(std::move(weights), prepared, to, activation_of(gate));
      })
      .def("combine", &Program::combine)
      .def("add_gated", &Program::add_gated)
      .def("add_normed", [](Program& self, int source, int64_t gain, float epsilon, int64_t k, int64_t groups, float factor, int to) {
        self.add_normed(source, at<const float>(gain), epsilon, k, groups, factor, to);
      })
      .def("multiply", &Program::multiply)
      .def("clear", &Program::clear)
      .def("take_wanted", &Program::take_wanted)
      .def("only_wanted", &Program::only_wanted)
      .def("rotate_and_store", [](Program& self, int source, int64_t layer, bool stores, int table, int64_t rotated,
                                  int64_t query_gain, int64_t key_gain, bool norm_values, bool whole, bool after, float epsilon,
                                  float scale, int query_table) {
        self.rotate_and_store(source, layer, stores, table, rotated, at<const float>(query_gain), at<const float>(key_gain),
                              norm_values, whole, after, epsilon, scale, query_table);
      })
      .def("attend", [](Program& self, int64_t layer, int64_t window, float cap, int64_t sinks) {
        self.attend(layer, window, cap, at<const float>(sinks));
      })
      .def("convolve", [](Program& self, int source, int64_t channels, int64_t taps, int64_t factor, int64_t gate, int64_t weight,
                          int64_t bias, bool silu, int64_t state, int to) {
        self.convolve(source, channels, taps, factor, gate, at<const float>(weight), at<const float>(bias), silu, state, to);
      })
      .def("recurrence", [](Program& self, int source, int rates, int64_t key_heads, int64_t value_heads, int64_t dk, int64_t dv,
                            int64_t rate, int64_t bias, int64_t skip, int64_t state, int to) {
        self.recurrence(source, rates, key_heads, value_heads, dk, dv, at<const float>(rate), at<const float>(bias),
                        at<const float>(skip), state, to);
      })
      .def("norm_gated", [](Program& self, int buffer, int gates, int64_t first, int64_t groups, int64_t gain, float epsilon,
                            int64_t width, bool gate_first) {
        self.norm_gated(buffer, gates, first, groups, at<const float>(gain), epsilon, width, gate_first);
      })
      .def("gate_ready", &Program::gate_ready)
      .def("cap_logits", &Program::cap_logits)
      .def("argmax", &Program::argmax)
      .def("step", &Program::step, nb::call_guard<nb::gil_scoped_release>())
      .def("profile", &Program::profile)
      .def_prop_ro("experts_read", &Program::experts_read)
      .def_prop_ro("bytes", &Program::bytes);
}
