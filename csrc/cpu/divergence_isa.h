// KL between two models' attention, tile by tile. Included once per instruction set, in this order.
#include "cpu/vec.h"
#include "cpu/rows.h"
#include "cpu/tile.h"
#include "cpu/head_tiles.h"
#include "cpu/divergence_rows.h"
#include "cpu/divergence_loops.h"
