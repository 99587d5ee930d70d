// The module: registration only.
#include "bindings/bindings.h"

#include <pybind11/pybind11.h>

PYBIND11_MODULE(_C, m, py::mod_gil_not_used()) {
  m.doc() = "kvquant's compiled kernels. Arguments are integers; kvquant.backends makes them.";
  kvquant::bindings::define_cache(m);
  kvquant::bindings::define_pieces(m);
  kvquant::bindings::define_plain(m);
  kvquant::bindings::define_info(m);
}
