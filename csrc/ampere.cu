#include "ampere_launch.cuh"

namespace laco {

const char* forward_ampere(const Forward& q, const Launch& how) {
  if (const char* error = refusal(q)) return error;
  if (q.x.batch == 0 || q.n == 0) return nullptr;
  return q.element == Element::bfloat16 ? ampere::forward<Element::bfloat16>(q, how)
                                        : ampere::forward<Element::float16>(q, how);
}

const char* input_gradient_ampere(const InputGradient& q, const Launch& how) {
  if (const char* error = refusal(q)) return error;
  if (q.gradient.batch == 0) return nullptr;
  return q.element == Element::bfloat16 ? ampere::input_gradient<Element::bfloat16>(q, how)
                                        : ampere::input_gradient<Element::float16>(q, how);
}

// Of no rows the gradient is zero, and is written.
const char* weight_gradient_ampere(const WeightGradient& q, const Launch& how) {
  if (const char* error = refusal(q)) return error;
  return q.element == Element::bfloat16 ? ampere::weight_gradient<Element::bfloat16>(q, how)
                                        : ampere::weight_gradient<Element::float16>(q, how);
}

}  // namespace laco
