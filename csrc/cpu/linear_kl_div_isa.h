// KL between two models' predictions of a vocabulary. Included once per instruction set, in this order.
#include "cpu/vec.h"
#include "cpu/rows.h"
#include "cpu/tile.h"
#include "cpu/head_tiles.h"
#include "cpu/divergence_rows.h"
#include "cpu/linear_loss_loops.h"
#include "cpu/linear_kl_div_loops.h"
