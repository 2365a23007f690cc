"""A transformers model that drafts trees, for several requests in one pass."""

import logging
from collections.abc import Sequence

from edge_client.drafters import Candidate, Part
from edge_client.drafters.hf.chains import HfDrafter
from edge_client.drafters.hf.passes import HfPasses
from edge_client.drafters.probe import PROBED, is_sound, probed_paths
from edge_client.drafters.slot_contexts import SlotSequence, branch_together
from edge_client.drafters.slots import MAX_SLOTS

logger = logging.getLogger(__name__)

WIDTHS = {"cuda": 16, "mps": 16, "cpu": 8}
"""Maximum entries of one context in a pass, by device."""
SHARED_ROWS = {"cuda": 32, "mps": 32, "cpu": 16}


class SlotDrafter:
    """The model of `chains`, which must not be used any more. Raises ValueError for a model with a state."""

    def __init__(self, chains: HfDrafter) -> None:
        device = chains.model.device.type
        self.fingerprint = chains.fingerprint
        self.max_context_tokens = min(chains.max_context_tokens, MAX_SLOTS // 2)
        self.max_width = WIDTHS[device]
        self.max_shared_rows = SHARED_ROWS[device]
        self.description = chains.description
        self._passes = HfPasses(chains.model, chains.kept)

    def open(self) -> SlotSequence:
        return SlotSequence(self._passes)

    def branch_together(self, parts: Sequence[Part]) -> list[list[list[Candidate]]]:
        return branch_together(self._passes, parts)


def with_trees(chains: HfDrafter) -> HfDrafter | SlotDrafter:
    """The same model for trees, if it gives the same output at their leaves as after the same chains; else `chains`."""
    before = chains.model.config._attn_implementation
    paths = probed_paths(chains.model.get_input_embeddings().num_embeddings)
    alone = [chains.open().append(path, PROBED) for path in paths]
    try:
        drafter = SlotDrafter(chains)
        if is_sound(drafter.open, paths, alone):
            return drafter
        logger.warning(
            "The draft's output changes under an attention mask: it drafts chains, one request in each pass."
        )
    except (TypeError, ValueError, RuntimeError, KeyError, AttributeError) as error:
        logger.warning("The draft model cannot run trees (%.120s): it drafts chains, one request in each pass.", error)
    chains.model.set_attn_implementation(before)
    return chains
