// The kernels of an instruction set as a table of functions over plain memory: the contract with everything else.
//
// Shapes: T rows (tokens), N outputs, K inputs. Matrices of activations are row-major with a stride in elements.
#pragma once

#include <cstdint>

#include "block_types.h"

namespace gossamer {

constexpr int PANEL = 32;       // columns of a packed panel
constexpr int STEP_BYTES = 128; // of a panel per step: four bytes of each column
constexpr int MASK_BYTES = STEP_BYTES / 8;  // of a sparse panel per step: a bit for each of these bytes
constexpr int RANK_STEPS = 32;  // steps after which a sparse panel says how many codes came before
constexpr int READ_AHEAD = 64;  // bytes behind the last code that may be read
constexpr int ROW_BLOCK = 256;  // rows that a packed weight is multiplied with at a time

// int8_blocks: of rows, int8 with a scale for every 32.
enum class Type : int { int8 = 0, bf16 = 1, f32 = 2, fp16 = 3, int8_blocks = 4 };

constexpr int bytes_of(Type type) { return type == Type::int8 || type == Type::int8_blocks ? 1 : type == Type::f32 ? 4 : 2; }
// A stored key or value of one head: its entries, or for int8 its codes, and then what they are multiplied with, in fp32.
constexpr int64_t kv_bytes(Type type, int64_t dim) { return dim * bytes_of(type) + (type == Type::int8 ? 4 : 0); }
constexpr Type query_type(Type kv) { return kv == Type::int8 ? Type::bf16 : kv; }

constexpr int step_of(Type type) { return 4 / bytes_of(type); }  // entries per four bytes

// Where output `row` of part `part` stands: the parts of a gated weight take turns, 16 columns each.
constexpr int64_t packed_row(int64_t row, int64_t part, int64_t parts) {
  return parts == 1 ? row : row / 16 * 32 + part * 16 + row % 16;
}

// Formats of packed weights: indices of Kernels::formats.
enum class Format : int { int8, sparse_int8, bf16, f32, blocks, stored_rows };
constexpr int FORMATS = 6;
constexpr Format format_of(Type type) { return type == Type::int8 ? Format::int8 : type == Type::bf16 ? Format::bf16 : Format::f32; }

// A weight (N, K), packed: panels of 32 outputs. A panel is one run of memory, so that reading it is reading ahead:
// its entries, [K / step][32][step], and for int8, which is stored as code + 128, the outlier store (S, 32) in 16 bit
// and the scales (32).
//
// A sparse panel, of int8 only, has in the place of its entries the mask of those that are not zero, in the same order
// (bit i of a byte is entry i of eight), and how many codes come before each 32 steps; behind the scales these codes.
//
// A panel in blocks is two groups of 16 outputs, each of a type of its own, in strips of as many outputs as a vector of
// the instruction set has lanes; see block_codes.h. Stored rows are rows of blocks as they are in a file: only to look up.
struct PackedWeight {
  Format format;
  Type type;                   // of the rows that it is multiplied with
  int64_t n, k;                // as the layer has them
  int64_t panels, steps;       // rounded up; what was added is zero
  int64_t entry_bytes;         // of a panel, as FormatKernels says
  int64_t stored;              // S, columns of the outlier store
  Type stored_type;            // bf16 or fp16
  int64_t stride;              // bytes from panel to panel, for what is not sparse
  int64_t* start;              // (panels + 1): where in the data each sparse panel begins; null for what is not sparse
  uint8_t* data;               // panels * stride bytes
  BlockType* types;            // of each 16 outputs, in blocks; of all, for stored rows
  int64_t few_rows;            // up to so many rows are multiplied with blocks as they are packed
  int32_t* place;              // (K): where the column stands in the store, or -1; null without a store
  float* bias;                 // (panels * 32), or null

  int64_t scaled_bytes() const { return entry_bytes + PANEL * (2 * stored + 4); }  // with the store and the scales

  uint8_t* panel(int64_t index) const { return data + (start ? start[index] : index * stride); }
  int64_t second_group(int64_t index) const { return group_bytes(types[2 * index], k); }
  uint16_t* store(int64_t index) const { return reinterpret_cast<uint16_t*>(panel(index) + entry_bytes); }
  float* scale(int64_t index) const { return reinterpret_cast<float*>(panel(index) + entry_bytes + stored * PANEL * 2); }
  int32_t* rank(int64_t index) const { return reinterpret_cast<int32_t*>(panel(index) + steps * MASK_BYTES); }
  uint8_t* codes(int64_t index) const { return panel(index) + scaled_bytes(); }
};

// Of 32 entries of a row in int8 blocks: their scale, and sums of their codes, of all and of each half.
struct RowBlock {
  float scale, scaled_sum;
  int32_t sum, half_sum[2];
  float scaled_half_sum[2];  // times the scale
  // The same, negative, in two parts of 16 bit: the codes 0 and 1 of every four, and 2 and 3.
  uint32_t minus_pairs, minus_half_pairs[2];
};
constexpr int64_t ROW_BLOCK_ENTRIES = 32;

// Rows made ready to be multiplied: codes, or the same numbers in bf16 or fp32.
struct Prepared {
  Type type;
  int64_t k, stride;       // entries per row, a multiple of the step; zeros beyond k
  void* data;
  float* scale;            // (T), int8 only
  int32_t* sum;            // (T), of the codes
  int32_t* outliers;       // (T): how many
  int32_t* columns;        // (T, K), of the outliers, ascending
  float* values;           // (T, K)
  RowBlock* blocks;        // (T, K / 32), int8 blocks only
};

enum class Extent : int { none = 0, token = 1, columns = 2 };

// Which entries of a row leave the int8 product; see gossamer.ops.int8.
struct Decomposition {
  Extent extent;
  bool relative;
  float threshold;
  const uint8_t* columns;  // (K) for Extent::columns: 1 where the column leaves
};

enum class Activation : int { none = 0, silu = 1, gelu_tanh = 2, gelu = 3, relu = 4, relu_squared = 5, clamped = 6 };

// y (T, N): y = x W^T + b + addend; added to what is there with `add`; for a gated weight, whose panels hold 16 columns
// of the gate and 16 of the other factor, y (T, N / 2) = activation(gate) * other: silu or gelu_tanh.
struct LinearCall {
  const PackedWeight* weight;
  const Prepared* x;
  float* y;
  int64_t y_stride;
  int64_t y_columns;       // how many columns of y may be written
  bool add;
  Activation gate;         // none: not gated
  const float* addend;     // (T, panels * 32) in the order of the panels, `addend_stride` between rows; or null
  int64_t addend_stride;
  int64_t first_row, last_row, first_panel, last_panel;
  float* scratch;          // of the thread: (K, 32) floats
  int32_t* index;          // of the thread: (K), all -1, and left so
  int32_t* used;           // of the thread: (K)
  uint8_t* entries;        // of the thread: a panel's, for a sparse weight
};

// Attention of some rows to consecutive keys of one head. Rows are (token, query head of the group) pairs.
struct AttentionTask {
  Type type;               // of keys and values: int8, bf16 or f32; q is of query_type(type)
  int64_t dim;             // D, even
  const void* q;           // (T, heads, D), scaled by log2(e) / sqrt(D) or the like
  int64_t q_stride;        // between tokens
  const int32_t* tokens;   // which rows of q
  const int64_t* position; // (T)
  int64_t rows;            // number of tokens
  int64_t group;           // query heads per key head
  int64_t head;            // the first query head
  const void* keys;        // (n) rows of kv_bytes(type, D)
  const void* values;
  int64_t n;
  int64_t start;           // position of the first key; a row sees keys up to its own position
  int64_t window;          // and at most so many of them; 0: all
  float* out;              // (rows, heads, D) not normalized, `out_stride` between tokens, at the first query head
  int64_t out_stride;
  float* state;            // (rows, heads, 2): the maximum, in base 2, and the sum; `state_stride` between tokens
  int64_t state_stride;
  uint8_t* scratch;        // of the thread: attention_scratch(dim) bytes
  bool invariant;          // rows come out the same, to the bit, however many there are; at most INVARIANT_KEYS keys
  const void* next_keys;   // of the task that this thread does next, which a task of a few rows fetches meanwhile, as
  const void* next_values; // many of them as it has itself; or null
  float cap;               // scores become cap tanh(score / cap), in base 2; 0: they stay
};

// Means that stand for keys of one head that a row need not attend to; see attention_within.h.
struct KeyMeans {
  const void* keys;     // (blocks) rows of kv_bytes(type, D): of each BLOCK_KEYS keys the mean
  const void* values;   // the same of the values
  const float* spread;  // (blocks, padded to a multiple of 32 with -1e30): mean square of what a block's keys are off their
                        // mean, per dimension
  int64_t blocks;       // whole ones; keys beyond are attended to always
  float threshold;      // root mean square share of attention above which a block is attended to
  float gain;           // log2 of what the weights of means are multiplied with
  float* scratch;       // of the thread: means_scratch(...) bytes
  int64_t check;        // which of the task's tokens, modulo their number, is attended to exactly as well; -1: none
  double* report;       // (MEANS_REPORT) what is added up over tasks: pairs of rows and keys that were computed, and all;
                        // over the rows checked |out - exact|^2, (lse - exact)^2, 1, and the share of the keys that means
                        // stand for: exact, and computed
};
constexpr int64_t BLOCK_KEYS = 32, MEANS_REPORT = 7;

constexpr int64_t INVARIANT_KEYS = 128;
constexpr int ATTENTION_ROWS = 96;   // most rows of a task, heads of the group counted
constexpr int ATTENTION_HEIGHT = 32; // most of these that are multiplied at a time
constexpr int64_t attention_keys(int64_t dim) { return dim <= 128 ? 256 : 128; }  // keys of a block
constexpr int64_t attention_scratch(int64_t dim) {
  const int64_t keys = attention_keys(dim), wide = (dim + 31) / 32 * 32;
  // queries, output, keys, values, scores and probabilities of a tile, running maximum, sum and ends of each row
  // and keys or values of a block in the type in which they are multiplied
  return 4 * (2 * ATTENTION_ROWS * wide + 2 * keys * wide + 2 * ATTENTION_HEIGHT * keys) + 24 * ATTENTION_ROWS + 4 * keys * dim;
}
constexpr int64_t means_scratch(int64_t dim, int64_t blocks) {
  const int64_t padded = (blocks + 31) / 32 * 32;
  return 4 * (ATTENTION_ROWS + 2) * padded + ATTENTION_ROWS * padded + 4 * ATTENTION_ROWS * (dim + 2);
}

// A causal convolution of each channel with `taps` weights, over the rows of one text. Of channels [first, last):
//   y = silu?(bias + sum_t weight_t z_t) gate?, z = x factor?, over the last `taps` rows, this one included.
struct ConvolutionCall {
  int64_t rows, channels, taps, first, last;  // taps: at most MOST_TAPS
  const float *x, *factor, *gate;             // (rows, channels), `x_stride` between rows; factor and gate may be null
  int64_t x_stride;
  const float *weight, *bias;                 // (taps, channels), the oldest row's first; (channels) or null
  bool silu;
  const float* before;                        // (taps - 1, channels): z before the first row; null: zeros
  float* after;                               // the same behind the last one
  int64_t certain;                            // rows behind which it is kept too,
  float* kept;                                // here; null: nowhere
  float* y;                                   // `y_stride` between rows
  int64_t y_stride;
};
constexpr int64_t MOST_TAPS = 8, CONVOLVED = 256;  // channels of a call at most, a multiple of any W

// One head of a linear attention, over the rows of one text. `corrects`: the gated delta rule (arXiv 2412.06464),
//   S = decay S + k (beta (v - (decay S)^T k))^T,  y = S^T q,  with k / |k| and q / (|q| sqrt(dk));
// otherwise a state space as in Mamba 2 (arXiv 2405.21060), S = decay S + k (beta v)^T,  y = S^T q + skip v.
struct RecurrenceCall {
  bool corrects;
  float skip;
  int64_t rows, dk, dv;
  const float *q, *k, *v;      // `x_stride` between rows
  int64_t x_stride;
  const float *decay, *beta;   // `rate_stride` between rows
  int64_t rate_stride;
  const float* before;         // S (dk, dv) before the first row; null: zeros
  float* after;                // behind the last one
  int64_t certain;             // rows behind which it is kept too,
  float* kept;                 // here; null: nowhere
  float* y;                    // (rows, dv), `y_stride` between rows
  int64_t y_stride;
  float* scratch;              // of the thread: recurrence_scratch(dk, dv) floats
};
constexpr int64_t RECURRENCE_TOKENS = 32, RECURRENCE_COLUMNS = 128;  // that are gone through at a time, at most
constexpr int64_t recurrence_scratch(int64_t dk, int64_t dv) {
  const int64_t wide = (dv + 63) / 64 * 64;
  return dk * wide + 2 * RECURRENCE_TOKENS * dk + 3 * RECURRENCE_COLUMNS;
}

// One token of a row of logits, drawn at random.
struct SampleCall {
  const float* logits;
  int64_t vocabulary;
  float peak;              // the largest logit, finite
  float temperature;       // above 0
  int64_t top_k;           // 0: off
  double top_p;            // above 1: off
  float min_p;             // 0: off
  double uniform;          // in [0, 1)
  void* scratch;           // sample_scratch(vocabulary) bytes, aligned like a double
};

constexpr int64_t SAMPLE_BLOCK = 256;  // tokens whose probabilities are summed before the distribution is inverted
constexpr int64_t sample_scratch(int64_t vocabulary) {
  const int64_t blocks = (vocabulary + SAMPLE_BLOCK - 1) / SAMPLE_BLOCK;
  return 8 * blocks + 4 * (blocks * SAMPLE_BLOCK + 64);  // a sum of each block, and candidates
}

// Rows of gradients, (m, d), `stride` entries from row to row.
struct GradientRows {
  Type type;               // f32 or bf16
  const void* data;
  int64_t m, d, stride;
};

constexpr int64_t GRAM_COLUMNS = 128;  // that are packed at a time

// Some rows of K, 2^(-|q_i - k_j|^2) or 2^(row_i + q_i . k_j), times x, over a range of panels of keys.
struct GaussianCall {
  int64_t rows, d;         // rows: at most GAUSSIAN_ROWS
  const float* q;          // (rows, d)
  const float* row;        // (rows); not read with differences
  bool differences;
  bool ready;              // whether the scratch holds these rows already, from the call before
  const float* panels;     // (panels, d, PANEL)
  int64_t first, last;     // of the panels
  const float* x;          // (columns, keys), `x_stride` between columns
  int64_t columns, x_stride;
  const float* w;          // (keys), or null
  double* y;               // (rows, columns) += K x
  int64_t y_stride;
  double* v;               // (rows) += K^2 w, entries squared
  int64_t v_stride;
  float* scratch;          // of the thread: gaussian_scratch(d) floats
};

constexpr int64_t GAUSSIAN_ROWS = 48;
constexpr int64_t GAUSSIAN_KEYS = 512;                   // whose entries are there at a time
constexpr int64_t GAUSSIAN_STRIDE = GAUSSIAN_KEYS + 16;  // not a power of two, which would keep rows from the same cache
constexpr int64_t gaussian_scratch(int64_t d) { return GAUSSIAN_ROWS * (d + 1 + GAUSSIAN_STRIDE) + 6 * GAUSSIAN_KEYS; }

// A weight format: its sizes and its kernels.
struct FormatKernels {
  Type type;                              // of the rows that it is multiplied with
  bool scaled;                            // an outlier store and scales stand behind the entries
  uint8_t padding;                        // each byte of an entry that is zero
  int64_t (*entry_bytes)(int64_t steps);  // of a panel, without the store, the scales and sparse codes
  // Packs rows [first, first + rows) of a weight: physical output first + r. `source` (rows, K) of `type`. Null for a format
  // that is made from another one.
  void (*pack)(PackedWeight& weight, const void* source, Type type, int64_t rows, int64_t first, int64_t part, int64_t parts);
  void (*multiply)(const LinearCall& call);
  // out (K) = the weights of one output, times `factor`.
  void (*look_up)(const PackedWeight& weight, int64_t output, float factor, float* out);
};

struct Kernels {
  const char* name;
  FormatKernels formats[FORMATS];
  const FormatKernels& of(Format format) const { return formats[static_cast<int>(format)]; }
  // Row `row` of x from k floats; `inverse` multiplies them first, `gain` (k) too unless null.
  void (*prepare)(const Prepared& x, int64_t row, const float* source, float inverse, const float* gain,
                  const Decomposition& outliers, float* scratch);
  float (*square_sum)(const float* x, int64_t k);
  void (*attend)(const AttentionTask& task);
  void (*attend_within)(const AttentionTask& task, const KeyMeans& means);
  // x (D) -> rotated by cos and sin (D / 2), halves paired; scaled; stored as `type`.
  void (*rotate)(const float* x, const float* cosine, const float* sine, int64_t dim, int64_t rotated, float scale, void* out,
                 Type type);
  void (*convert)(const float* x, int64_t n, void* out, Type type);  // to f32 or bf16
  void (*quantize)(const float* x, int64_t n, uint8_t* out);         // to kv_bytes(int8, n): absmax scale
  // out (D) = sum over parts of weight * part, for states of base 2.
  void (*merge)(const float* const* parts, const float* const* states, int64_t count, int64_t dim, float* out);
  // (out (D), state) = what a row gets from the keys of both states; `state` as in AttentionTask.
  void (*join)(float* out, float* state, const float* other, const float* other_state, int64_t dim);
  // out (k) = (x - mean) / sqrt(variance + epsilon) * gain + bias; the bias may be null.
  void (*layer_norm)(const float* x, const float* gain, const float* bias, float epsilon, int64_t k, float* out);
  void (*activate)(float* x, int64_t k, Activation by);  // in place
  void (*gated)(float* x, const float* other, int64_t k, Activation by);  // x = activation(x) * other
  void (*convolve)(const ConvolutionCall& call);
  void (*recur)(const RecurrenceCall& call);
  void (*gate_by)(float* x, const float* gate, int64_t k, bool silu);  // x *= silu(gate) or sigmoid(gate)
  void (*cap)(float* x, int64_t k, float most);          // x = most tanh(x / most)
  void (*scale_row)(const float* x, float factor, const float* gain, int64_t k, float* out, bool add);
  // Index of the largest of n; the first of them; -1 if there is a NaN or nothing above -inf.
  int64_t (*argmax)(const float* x, int64_t n);
  int64_t (*sample)(const SampleCall& call);
  // Over columns [first, last); see gradients.h.
  void (*dot_rows)(const GradientRows& g, const float* x, int64_t first, int64_t last, double* out);
  void (*combine_rows)(const GradientRows& g, const float* w, int64_t first, int64_t last, float* out);
  void (*gram)(const GradientRows& g, int64_t first, int64_t last, double* out, double* scratch);
  void (*gaussian)(const GaussianCall& call);
};

// Best first; null at the end. Only those that this processor can run.
const Kernels* const* available();

}  // namespace gossamer
