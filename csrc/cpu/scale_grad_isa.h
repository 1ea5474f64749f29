// Part of a dense tensor, scaled and converted. Included once per instruction set.
#include "cpu/vec.h"
#include "cpu/rows.h"

namespace bertops::BERTOPS_ISA {

template <class T>
void scale_part(const Heads& from, const void* factor, int64_t first, int64_t last, const Heads& to) {
  store_as(to.dtype, static_cast<const T*>(from.data) + first, last - first, *static_cast<const T*>(factor),
           to.data, first);
}

}  // namespace bertops::BERTOPS_ISA
