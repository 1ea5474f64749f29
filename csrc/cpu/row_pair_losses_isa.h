// Losses between paired hidden states. Included once per instruction set, in this order.
#include "cpu/vec.h"
#include "cpu/rows.h"
#include "cpu/row_pair_rows.h"
#include "cpu/row_pair_losses_loops.h"
