// The names under which common/entropy.h finds the functions of vec.h. Included once per instruction set.
#undef BERTOPS_ENTROPY_INLINE
#define BERTOPS_ENTROPY_INLINE BERTOPS_INLINE

namespace bertops::BERTOPS_ISA {

template <class V>
BERTOPS_INLINE V exp_of(V x) {
  return exp(x);
}

template <class V>
BERTOPS_INLINE V log1p_of(V x) {
  return log1p(x);
}

}  // namespace bertops::BERTOPS_ISA
