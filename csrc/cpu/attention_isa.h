// Attention over one head, tile by tile, lanes of a vector along the queries: softmax then needs no sums across
// lanes, and K and V enter every product as the operand that is broadcast. Only real rows are loaded into
// scratch, so masked keys cost nothing and masked values are never read. Included once per instruction set, in
// this order.
#include "cpu/vec.h"
#include "cpu/rows.h"
#include "cpu/tile.h"
#include "cpu/head_tiles.h"
#include "cpu/attention_tiles.h"
#include "cpu/attention_forward.h"
#include "cpu/attention_backward.h"
