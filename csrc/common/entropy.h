// The entropy of softmax(z) from sums over distances d = z - m to the largest element m of a row. With
//   rest     = sum of e^d over all elements but one that equals m
//   weighted = sum of e^d * d
// p = e^d / (1 + rest), H = ln(1 + rest) - mean, where mean = weighted / (1 + rest) is the expected distance: both
// terms are positive and keep their digits where one element has nearly all of the probability. The logarithm of p
// is d - ln(1 + rest), so ln p + H = d - mean, and dH/dz = -p (d - mean).
// Used by CPU and CUDA kernels: V is a number, or a vector of rows. Included once per instruction set and once for
// CUDA, after exp_of(V) and log1p_of(V), in namespace bertops::BERTOPS_ISA; BERTOPS_ENTROPY_INLINE qualifies.
namespace bertops::BERTOPS_ISA {

template <class V>
struct EntropyTerm {
  V power, weighted;
};

// What an element at distance d <= 0 adds to both sums. 0 for -inf, NaN for NaN.
template <class V>
BERTOPS_ENTROPY_INLINE EntropyTerm<V> entropy_term(V distance) {
  const V finite = distance < -1000 ? V{} - 1000 : distance;  // e^-1000 is 0 in fp64 too
  const V power = exp_of(finite);
  return {power, power * finite};
}

template <class V>
BERTOPS_ENTROPY_INLINE V expected_distance(V rest, V weighted) {
  return weighted / (rest + 1);
}

// NaN where the largest element is no number: then there is no softmax.
template <class V>
BERTOPS_ENTROPY_INLINE V entropy_of(V largest, V rest, V weighted) {
  return log1p_of(rest) - expected_distance(rest, weighted) + (largest - largest);
}

// dH/dz of an element: NaN as the entropy is, 0 where the probability is 0.
template <class V>
BERTOPS_ENTROPY_INLINE V entropy_grad(EntropyTerm<V> term, V largest, V rest, V weighted) {
  const V mean = expected_distance(rest, weighted);
  return (term.power * mean - term.weighted) / (rest + 1) + (largest - largest);
}

// `unit` turns nats into the unit of the threshold; `top` is the largest entropy in that unit, which rounding must
// not pass.
template <class V, class T>
BERTOPS_ENTROPY_INLINE V uncertainty_of(V entropy, T unit, T top) {
  const V scaled = entropy * unit;
  const V low = scaled < 0 ? V{} : scaled;
  return low > top ? V{} + top : low;
}

}  // namespace bertops::BERTOPS_ISA
