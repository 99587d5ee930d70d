// quantize, dequantize and the unfused matmuls: the operations on plain (q, scale, zero) tensors.
#include "bindings/bindings.h"

namespace kvquant::bindings {
namespace {

using Strides = py::tuple;  // elements

int64_t at(const Strides& strides, int i) { return strides[i].cast<int64_t>(); }

// strides: (batch, head, group, channel), 0 where a pair is shared.
Affine affine(uintptr_t scale, uintptr_t zero, const Strides& strides, int group) {
  return {pointer<const float>(scale),
          pointer<const float>(zero),
          at(strides, 0),
          at(strides, 1),
          at(strides, 2),
          at(strides, 3),
          group};
}

void quantize(uintptr_t x, Strides strides, int batch, int heads, int tokens, int dim, int dtype,
              uintptr_t q, uintptr_t scale, uintptr_t zero, int granularity, int group, float qmin,
              float qmax, int device, uintptr_t queue) {
  const QuantizeParams params{pointer<const void>(x),
                              at(strides, 0),
                              at(strides, 1),
                              at(strides, 2),
                              batch,
                              heads,
                              tokens,
                              dim,
                              Dtype(dtype),
                              pointer<uint8_t>(q),
                              pointer<float>(scale),
                              pointer<float>(zero),
                              Granularity(granularity),
                              group,
                              qmin,
                              qmax};
  KVQUANT_RUN(quantize, params, device, queue);
}

void dequantize(uintptr_t q, Strides strides, int batch, int heads, int tokens, int dim,
                uintptr_t scale, uintptr_t zero, Strides affine_strides, int group, uintptr_t out,
                int dtype, int device, uintptr_t queue) {
  const DequantizeParams params{pointer<const uint8_t>(q),
                                at(strides, 0),
                                at(strides, 1),
                                at(strides, 2),
                                batch,
                                heads,
                                tokens,
                                dim,
                                affine(scale, zero, affine_strides, group),
                                pointer<void>(out),
                                Dtype(dtype)};
  KVQUANT_RUN(dequantize, params, device, queue);
}

MatmulParams matmul(uintptr_t x, Strides x_strides, uintptr_t q, Strides strides, uintptr_t scale,
                    uintptr_t zero, Strides affine_strides, int group, uintptr_t out, int dtype,
                    int batch, int heads, int kv_heads, int rows, int tokens, int dim) {
  return {pointer<const void>(x),
          at(x_strides, 0),
          at(x_strides, 1),
          at(x_strides, 2),
          pointer<const uint8_t>(q),
          at(strides, 0),
          at(strides, 1),
          at(strides, 2),
          affine(scale, zero, affine_strides, group),
          pointer<void>(out),
          Dtype(dtype),
          batch,
          heads,
          kv_heads,
          rows,
          tokens,
          dim};
}

}  // namespace

void define_plain(py::module_& m) {
  py::class_<MatmulParams>(m, "MatmulParams", py::module_local()).def(py::init(&matmul));
  m.def("quantize", &quantize);
  m.def("dequantize", &dequantize);
  m.def("qk_matmul", [](const MatmulParams& params, int device, uintptr_t queue) {
    KVQUANT_RUN(qk_matmul, params, device, queue);
  });
  m.def("pv_matmul", [](const MatmulParams& params, int device, uintptr_t queue) {
    KVQUANT_RUN(pv_matmul, params, device, queue);
  });
}

}  // namespace kvquant::bindings
