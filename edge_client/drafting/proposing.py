"""What of a draft tree goes into a proposal. Pure."""

from collections.abc import Callable

from edge_client.drafting.draft_tree import Node
from vllm_specedge.wire.frames import Propose


def new_branches(trunk: list[Node], is_of_use: Callable[[Node], bool]) -> list[list[Node]]:
    """The paths that leave the trunk, each from its fork on, with something in it that was not sent.

    A second candidate alone is of no use: when the target says it, it is committed already.
    """
    paths = []
    for first in (other for node in trunk if node.parent for other in node.parent.children[1:]):
        path = [node for node in (first, *first.chain()) if is_of_use(node)]
        if len(path) > 1 and not path[-1].is_sent:
            paths.append(path)
    return paths


def proposal(number: int, before: Node, trunk: list[Node], branches: list[list[Node]]) -> Propose:
    """One frame with the new part of a trunk, which follows the node `before`, and these branches. Marks them as sent.

    It starts with the token that the new part follows: so it shows whether the past that it was drafted for has come
    true.
    """
    run = [before, *trunk]
    end = run[-1].position + 1
    new = [*run, *(node for branch in branches for node in branch)]
    forks = [number for branch in branches for number in (end - branch[0].position, len(branch))]
    for node in new:
        node.is_sent = True
    return Propose(number, run[0].position, tuple(node.token for node in new), tuple(forks))
