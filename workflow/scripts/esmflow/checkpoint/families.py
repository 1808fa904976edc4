"""What sets each family of models apart: weights are checked, arranged and run by this alone."""

from __future__ import annotations

from dataclasses import dataclass, replace

EPSILON = 1e-5
"""Of every norm, in every family."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """What sets one family apart from the others: its weights are checked, arranged and run by this alone.

    What is not said here is the same in all: transformer layers with a norm before each of their two parts, cls before
    and eos after the residues, and the 33 tokens of ESM-2 (31 means something else in some).

    name, citation: as a paper says it. licence: of the published weights. owner: whose repositories they are in on
    Hugging Face. reference: what a certificate is computed with.

    embedding_rows: of the token embedding; beyond the 33 tokens they are padding. embedding_scale: what it is
    multiplied with where no token is masked. rotary: whether queries and keys are turned by their positions; learned
    positions are added to the tokens otherwise. norm_before: whether there is a norm before the first layer.
    biases: whether linear layers and the norm after the last layer have them. query_key_norms: whether queries and keys
    are normalised, over all heads together, before they are turned. gate: whether the feed-forward part is SiLU of one
    product times another (SwiGLU), instead of GELU of one. branch_depth: the number of layers at which what a layer
    adds to the residual stream is added as it is; with L it is divided by sqrt(L / branch_depth). None: always as it
    is. tied_head: whether the decoder of the language model head is the token embedding. contacts: whether a contact
    head was published. in_fair_esm: whether fair-esm has its module. eight_bits: whether products of 8 bits
    are made for it; with ESM C they were measured on random weights only.
    """

    name: str
    citation: str
    licence: str = "MIT"
    owner: str = "facebook"
    reference: str

    embedding_rows: int = 33
    # Trained with 15% of tokens chosen and 80% of those masked: without masks, embeddings shrink by this.
    embedding_scale: float = 1 - 0.15 * 0.8
    rotary: bool = True
    norm_before: bool = False
    biases: bool = True
    query_key_norms: bool = False
    gate: bool = False
    branch_depth: int | None = None
    tied_head: bool = True
    contacts: bool = True
    in_fair_esm: bool = True
    eight_bits: bool = False


ESM2 = Family(
    name="ESM-2",
    citation="Lin et al., 2023",
    reference="fair-esm's own ESM-2 module in fp32",
    eight_bits=True,
)
ESM1B = Family(
    name="ESM-1b",
    citation="Rives et al., 2021",
    reference="fair-esm's own ESM-1b module in fp32",
    rotary=False,
    norm_before=True,
)
ESM1V = replace(
    ESM1B,
    name="ESM-1v",
    citation="Meier et al., 2021",
    reference="fair-esm's own ESM-1v module in fp32",
    norm_before=False,
    contacts=False,
)
ESMC = Family(
    name="ESM C",
    citation="ESM Team, 2024",
    owner="biohub",
    reference="a plain implementation of ESM C in fp32, written apart from the engine",
    embedding_rows=64,
    embedding_scale=1.0,
    biases=False,
    query_key_norms=True,
    gate=True,
    branch_depth=36,
    tied_head=False,
    contacts=False,
    in_fair_esm=False,
    eight_bits=True,
)
FAMILIES = {family.name: family for family in (ESM2, ESM1B, ESM1V, ESMC)}
