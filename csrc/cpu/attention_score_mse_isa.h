// TinyBERT's attention loss, tile by tile or from Gram matrices. Included once per instruction set, in this order.
#include "cpu/vec.h"
#include "cpu/rows.h"
#include "cpu/tile.h"
#include "cpu/head_tiles.h"
#include "cpu/attention_score_mse_loops.h"
