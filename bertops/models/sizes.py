"""The shapes of the published models, to be built as they are or with ``dataclasses.replace``.

::

    student = BertModel(sizes.TINYBERT_4)
    student = BertForSequenceClassification(replace(sizes.MINILM_6X384, num_labels=3))

=============== ====== ===== ===== ===== =========== ======== ==================
name            layers width heads FFN   parameters  GFLOP    source
=============== ====== ===== ===== ===== =========== ======== ==================
BERT_BASE       12     768   12    3072  109,482,240 22.35    Devlin et al. 2019
BERT_LARGE      24     1024  16    4096  335,141,888 78.92    Devlin et al. 2019
DISTILBERT      6      768   12    3072  66,362,880  11.17    Sanh et al. 2019
PKD_6           6      768   12    3072  66,955,008  11.17    Sun et al. 2019
PKD_3           3      768   12    3072  45,691,392  5.59     Sun et al. 2019
TINYBERT_6      6      768   12    3072  66,955,008  11.17    Jiao et al. 2020
TINYBERT_4      4      312   12    1200  14,350,248  1.25     Jiao et al. 2020
MINILM_12X384   12     384   12    1536  33,360,000  5.74     Wang et al. 2020
MINILM_6X384    6      384   12    1536  22,713,216  2.87     Wang et al. 2020
MINILM_6X768    6      768   12    3072  66,955,008  11.17    Wang et al. 2020
MOBILEBERT      24     512   4     512   24,581,888  5.39     Sun et al. 2020
MOBILEBERT_TINY 24     512   4     512   15,485,696  3.07     Sun et al. 2020
IB_BERT         24     512   4     4096  294,467,840 75.75    Sun et al. 2020
=============== ====== ===== ===== ===== =========== ======== ==================

Parameters are those of the bare encoder with English BERT's vocabulary and its pooler, which DistilBERT and
MobileBERT have not. GFLOP are those of a sequence of 128 tokens without the pooler, a multiplication with its
addition counting two: :func:`bertops.early_exit.flops.encoder_flops`. IB_BERT is MobileBERT's teacher.
"""

from dataclasses import replace

from bertops.models.config import BertConfig, MobileBertConfig

BERT_BASE = BertConfig()
BERT_LARGE = BertConfig(
    hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096
)

DISTILBERT = BertConfig(
    family="distilbert",
    num_hidden_layers=6,
    type_vocab_size=0,
    attention_output_dropout_p=0.0,
    classifier_dropout_p=0.2,
    pooler=False,
)

PKD_6 = replace(BERT_BASE, num_hidden_layers=6)
PKD_3 = replace(BERT_BASE, num_hidden_layers=3)

TINYBERT_6 = replace(BERT_BASE, num_hidden_layers=6)
TINYBERT_4 = BertConfig(hidden_size=312, num_hidden_layers=4, num_attention_heads=12, intermediate_size=1200)

MINILM_12X384 = BertConfig(
    hidden_size=384, num_hidden_layers=12, num_attention_heads=12, intermediate_size=1536
)
MINILM_6X384 = replace(MINILM_12X384, num_hidden_layers=6)
MINILM_6X768 = replace(BERT_BASE, num_hidden_layers=6)

MOBILEBERT = MobileBertConfig()
MOBILEBERT_TINY = MobileBertConfig(
    use_bottleneck_attention=True, key_query_shared_bottleneck=False, num_feedforward_networks=2
)
IB_BERT = MobileBertConfig(  # its code's GELU is the tanh form
    intermediate_size=4096,
    hidden_act="gelu_new",
    hidden_dropout_p=0.1,
    classifier_dropout_p=0.1,
    pooler=True,
    intra_bottleneck_size=1024,
    key_query_shared_bottleneck=False,
    num_feedforward_networks=1,
    normalization_type="layer_norm",
)
