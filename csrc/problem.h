// The matrix products of this library seen from outside: plain pointers and sizes, no torch. Everything is of one 16-bit type,
// sums are float. Channels, n and strides are multiples of 8, pointers are 16-byte aligned.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <initializer_list>

namespace laco {

constexpr int MAX_SOURCES = 8;
constexpr int MAX_SIDE = 8;   // of a window: the copy engine steps no further
constexpr int SUM_ROWS = 16;  // rows that one line of an InputGradient's `sums` is the sum of

enum class Element : int { bfloat16 = 0, float16 = 1 };
enum class Activation : int { none = 0, erf = 1, tanh = 2 };  // as torch.nn.functional.gelu's `approximate`
enum class Product : int { forward = 0, input_gradient = 1, weight_gradient = 2 };
enum class Residual : int { none = 0, mean = 1, channel_group = 2 };

// Where an operand's rows lie. Row m = b * rows_per_image + q is window q of image b, and its depth is ordered (source, dy, dx,
// channel); a window of side 1 is a token. A line's tokens, and an image's lines, follow each other. A grid that windows do not
// fill is zero-padded at the bottom and right.
struct Tokens {
  const void* sources[MAX_SOURCES];
  int num_sources;
  int batch, height, width;
  int64_t stride_b, stride_t;  // in elements, from one image to the next and from one token to the next
  int side;                    // of a window, in tokens
  int channels;

  int out_width() const { return int((int64_t(width) + side - 1) / side); }
  int64_t rows_per_image() const { return (int64_t(height) + side - 1) / side * out_width(); }
  int64_t rows() const { return batch * rows_per_image(); }
  int64_t taps() const { return int64_t(side) * side; }
  int64_t depth() const { return num_sources * taps() * channels; }
};

// out[m, n] = act(sum_k x[m, k] weight[n, k] + bias[n]) + R(S(residual))[m, n]
struct Forward {
  static constexpr Product PRODUCT = Product::forward;
  Element element;
  Tokens x;
  const void* weight;  // [n, depth] contiguous
  const void* bias;    // [n] or null
  int n;
  Activation activation;
  void* out;       // [batch, out_prefix + rows, n] contiguous; prefix rows are not written
  int out_prefix;  // with a residual only
  void* pre;       // [rows, n]: what the activation is applied to, or null
  Residual residual_kind;
  Tokens residual;      // n channels; its windows are the output's rows
  bool residual_block;  // they lie window by window
};

// The residual's tokens line by line: window by window they are what a column of windows is.
inline Tokens residual_tokens(const Forward& q) {
  Tokens t = q.residual;
  if (q.residual_block) t.height = int(t.rows_per_image()) * t.side, t.width = t.side;
  return t;
}

// g[m, k] = sum_n gradient[m, n] weight[n, k], the gradient of a product's rows, whose depth is `side` * `side` * `channels`.
//
// With `pre`, [rows, channels], the rows are an activation's (side 1): out = g gelu'(pre), act = gelu(pre), and line i of `sums`
// is the sum of out's rows 16 i .. 16 i + 15.
// Without, they are windows of tokens (side >= 1): out[b, out_prefix + token] = g + the residual's gradient. Every token of the
// grid is written, the prefix is not.
struct InputGradient {
  static constexpr Product PRODUCT = Product::input_gradient;
  Element element;
  Tokens gradient;     // one source, side 1; n channels
  const void* weight;  // [n, side * side * channels] contiguous
  int side, channels;
  const void* pre;
  Activation activation;
  void* act;                    // [rows, channels] or null
  float* sums;                  // [ceil(rows / 16), channels] or null
  void* out;                    // [rows, channels], or [batch, out_prefix + height * width, channels]; contiguous
  int out_prefix, height, width;  // of the tokens; 0, 1 and the rows with `pre`
  Residual residual_kind;
  Tokens residual_gradient;  // one source, side 1: of the sum that the residual went into; as many channels as `channels`
};

// out[i, k] = sum_m gradient[m, i] x[m, k]
struct WeightGradient {
  static constexpr Product PRODUCT = Product::weight_gradient;
  Element element;
  Tokens gradient;  // one source, side 1; n channels
  Tokens x;
  void* out;  // [n, depth of x] contiguous
};

// ---- what of a problem the kernels cannot do, or null ----

inline bool is_misaligned(std::initializer_list<const void*> pointers) {
  for (const void* pointer : pointers) {
    if (reinterpret_cast<uintptr_t>(pointer) % 16) return true;
  }
  return false;
}

constexpr int64_t MOST = int64_t(1) << 30;      // rows, and numbers of a row: kernels count both in 32 bits
constexpr int64_t FARTHEST = int64_t(1) << 39;  // elements to the next token or image: the copy engine has 40 bits for bytes
constexpr const char* LONG = "a row is too long for 32-bit numbers";
constexpr const char* MISSING = "a pointer is null that must not be";

inline const char* refusal(const Tokens& t) {
  if (t.num_sources < 1 || t.num_sources > MAX_SOURCES) return "there must be 1 to 8 sources";
  if (t.batch < 0 || t.height < 1 || t.width < 1 || t.channels < 1) return "sizes must be positive";
  if (t.side < 1 || t.side > MAX_SIDE) return "windows must be 1 to 8 tokens wide";
  const int64_t tokens = int64_t(t.height) * t.width;
  if (tokens >= int64_t(1) << 31) return "too many tokens for 32-bit token numbers";
  if (t.rows() >= MOST) return "too many rows for 32-bit row numbers";
  if (t.depth() >= MOST) return LONG;
  if (t.channels % 8 || t.stride_t % 8 || t.stride_b % 8) return "channels, n and strides must be multiples of 8";
  if (t.stride_t >= FARTHEST / tokens || (t.batch > 1 && t.stride_b >= FARTHEST)) {
    return "strides must be shorter than 2^39 elements";
  }
  if (t.stride_t < t.channels || (t.batch > 1 && t.stride_b < tokens * t.stride_t)) return "tokens or images overlap";
  for (int i = 0; i < t.num_sources; ++i) {
    if (t.batch > 0 && !t.sources[i]) return MISSING;
    if (is_misaligned({t.sources[i]})) return "pointers must be 16-byte aligned";
  }
  return nullptr;
}

inline const char* refusal(Element element, Activation activation, Residual residual = Residual::none) {
  if (element != Element::bfloat16 && element != Element::float16) return "element must be 0 or 1";
  if (int(activation) < 0 || int(activation) > 2) return "activation must be 0, 1 or 2";
  if (int(residual) < 0 || int(residual) > 2) return "residual_kind must be 0, 1 or 2";
  return nullptr;
}

inline const char* refusal(const Forward& q) {
  if (const char* error = refusal(q.element, q.activation, q.residual_kind)) return error;
  if (const char* error = refusal(q.x)) return error;
  if (q.n < 0 || q.out_prefix < 0) return "sizes must be positive";
  if (q.n >= MOST) return LONG;
  if (q.n % 8) return "channels, n and strides must be multiples of 8";
  if (q.x.batch > 0 && q.n > 0 && !(q.weight && q.out)) return MISSING;
  if (q.pre && q.activation == Activation::none) return "there is nothing to save";
  if (is_misaligned({q.weight, q.bias, q.out, q.pre})) return "pointers must be 16-byte aligned";
  if (q.residual_kind == Residual::none) return q.out_prefix ? "an output with prefix tokens needs a residual" : nullptr;
  if (q.activation != Activation::none) return "the residual comes without an activation";
  const Tokens& r = q.residual;
  if (const char* error = refusal(r)) return error;
  if (r.num_sources != 1 || r.channels != q.n) return "the residual must be one source as wide as the output";
  if (r.batch != q.x.batch || r.rows() != q.x.rows()) return "the residual's windows must be the output's rows";
  if (q.residual_block && (r.height % r.side || r.width % r.side || r.stride_t != r.channels ||
                           (r.batch > 1 && r.stride_b != int64_t(r.height) * r.width * r.channels))) {
    return "a residual in block order must be contiguous, with a grid of whole windows and no prefix";
  }
  return nullptr;
}

inline const char* refusal_of_rows(const Tokens& t) {
  if (const char* error = refusal(t)) return error;
  return t.num_sources != 1 || t.side != 1 ? "a gradient must be one source of single tokens" : nullptr;
}

inline const char* refusal(const InputGradient& q) {
  if (const char* error = refusal(q.element, q.activation, q.residual_kind)) return error;
  if (const char* error = refusal_of_rows(q.gradient)) return error;
  if (q.side < 1 || q.side > MAX_SIDE) return "windows must be 1 to 8 tokens wide";
  if (q.channels < 1 || q.height < 1 || q.width < 1 || q.out_prefix < 0) return "sizes must be positive";
  if (int64_t(q.side) * q.side * q.channels >= MOST) return LONG;
  if (q.channels % 8) return "channels, n and strides must be multiples of 8";
  if (q.gradient.batch > 0 && !(q.weight && q.out)) return MISSING;
  if (is_misaligned({q.weight, q.pre, q.act, q.sums, q.out})) return "pointers must be 16-byte aligned";
  if (int64_t(q.height) * q.width >= int64_t(1) << 31) return "too many tokens for 32-bit token numbers";
  const Tokens grid{{}, 1, q.gradient.batch, q.height, q.width, 0, 0, q.side, q.channels};
  if (grid.rows() != q.gradient.rows()) return "the windows must be the gradient's rows";
  if (q.pre) {
    if (q.activation == Activation::none) return "there is no activation to go back through";
    if (q.side != 1 || q.out_prefix || q.residual_kind != Residual::none) return "an activation's rows are plain";
    return nullptr;
  }
  if (q.activation != Activation::none || q.act || q.sums) return "an activation's gradient needs what it was applied to";
  if (q.residual_kind == Residual::none) return nullptr;
  if (const char* error = refusal_of_rows(q.residual_gradient)) return error;
  if (q.residual_gradient.channels != q.channels) return "the residual must be one source as wide as the output";
  if (q.residual_gradient.batch != q.gradient.batch || q.residual_gradient.rows() != q.gradient.rows()) {
    return "the windows must be the gradient's rows";
  }
  return nullptr;
}

inline const char* refusal(const WeightGradient& q) {
  if (const char* error = refusal(q.element, Activation::none)) return error;
  if (const char* error = refusal_of_rows(q.gradient)) return error;
  if (const char* error = refusal(q.x)) return error;
  if (q.x.batch != q.gradient.batch || q.x.rows() != q.gradient.rows()) return "the windows must be the gradient's rows";
  if (!q.out) return MISSING;
  return is_misaligned({q.out}) ? "pointers must be 16-byte aligned" : nullptr;
}

}  // namespace laco
