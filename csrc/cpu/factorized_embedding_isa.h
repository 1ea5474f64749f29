// ALBERT's embedding. Included once per instruction set, in this order.
#include "cpu/vec.h"
#include "cpu/rows.h"
#include "cpu/tile.h"
#include "cpu/head_tiles.h"
#include "cpu/factorized_embedding_rows.h"
#include "cpu/factorized_embedding_forward.h"
#include "cpu/factorized_embedding_backward.h"
#include "cpu/segment_sums_loops.h"
