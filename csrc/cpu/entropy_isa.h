// Entropy of rows. Included once per instruction set, in this order.
#include "cpu/vec.h"
#include "cpu/rows.h"
#include "cpu/entropy_math.h"
#include "common/entropy.h"
#include "cpu/entropy_loops.h"
