// Squared error of projected hidden states. Included once per instruction set, in this order.
#include "cpu/vec.h"
#include "cpu/rows.h"
#include "cpu/tile.h"
#include "cpu/head_tiles.h"
#include "cpu/linear_loss_loops.h"
#include "cpu/projected_mse_loops.h"
