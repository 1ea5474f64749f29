// KL between the softmax of paired rows. Included once per instruction set, in this order.
#include "cpu/vec.h"
#include "cpu/rows.h"
#include "cpu/row_pair_rows.h"
#include "cpu/kl_div_logits_loops.h"
