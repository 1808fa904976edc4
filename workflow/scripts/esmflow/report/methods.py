"""What a paper says about a run: a paragraph to paste, made of what was done and found, and what it cites."""

from __future__ import annotations

from collections.abc import Iterable

from esmflow.arrays import Array
from esmflow.checkpoint.families import ESM1B, ESM1V, ESM2, ESMC
from esmflow.report.manifest_counts import ManifestCounts
from esmflow.report.run_files import RunFiles, devices
from esmflow.text import in_words, plural

_SNAKEMAKE = """\
Mölder F, Jablonski KP, Letcher B, et al. Sustainable data analysis with Snakemake.
F1000Research 2021;10:33. https://doi.org/10.12688/f1000research.29032.2
"""
_MODELS = {
    ESM2.name: """\
Lin Z, Akin H, Rao R, et al. Evolutionary-scale prediction of atomic-level protein structure with a language model.
Science 2023;379:1123–1130. https://doi.org/10.1126/science.ade2574
""",
    ESM1B.name: """\
Rives A, Meier J, Sercu T, et al. Biological structure and function emerge from scaling unsupervised learning to 250
million protein sequences. PNAS 2021;118:e2016239118. https://doi.org/10.1073/pnas.2016239118
""",
    ESM1V.name: """\
Meier J, Rao R, Verkuil R, et al. Language models enable zero-shot prediction of the effects of mutations on protein
function. NeurIPS 2021;34:29287–29303. https://doi.org/10.1101/2021.07.09.450648
""",
    ESMC.name: """\
ESM Team. ESM Cambrian: revealing the mysteries of proteins with unsupervised learning. EvolutionaryScale, 2024.
https://www.evolutionaryscale.ai/blog/esm-cambrian
""",
}

_KINDS = {
    "mean": "the mean over its residues",
    "bos": "the vector of the token before its first residue",
    "max": "the maximum over its residues",
    "std": "the standard deviation over its residues",
    "per_residue": "one vector for each residue",
    "attention": "the attention maps",
}
_OTHERS = {
    "contacts": "predicted contacts",
    "logits": "the logits of each residue",
    "entropy": "the entropy of the prediction for each residue",
    "pseudo_perplexity": "its pseudo-perplexity from one pass without masks",
}


def references(files: RunFiles) -> str:
    """What the paragraph cites."""
    cited = [files.model.dimensions.family.name, *([ESM1V.name] if files.variants else [])]
    return "\n".join([*(_MODELS[name] for name in dict.fromkeys(cited)), _SNAKEMAKE])


def methods_paragraph(files: RunFiles, counts: ManifestCounts) -> str:
    """The sentences, without the `references`."""
    method, summary, certificate = files.fingerprint, files.summary, files.certificate
    family = files.model.dimensions.family
    checkpoint = files.model.name + (f", a LoRA adapter merged into {files.model.base}" if files.model.base else "")
    sentences = [
        f"Protein sequences were embedded with {family.name} ({family.citation}; checkpoint {checkpoint}) "
        f"by esmflow (method version {method.method_version}), a Snakemake (Mölder et al., 2021) workflow.",
        f"For each protein it computed {_outputs(method.outputs.arrays())}.",
        f"Computing was in {in_words(counts.precisions)} with the {method.engine} engine"
        + (f" on {devices(files)}" if files.slots() else "")
        + (f" and PyTorch {summary.versions['torch']}." if "torch" in summary.versions else "."),
    ]
    cut = f"of more than {method.max_residues:,} residues" if method.max_residues else ""
    if summary.truncated:
        sentences.append(f"{plural(summary.truncated, 'sequence')} {cut} were cut off there.")
    if summary.windowed:
        windows = f"embedded in windows that overlap by {method.window_overlap} residues"
        sentences.append(f"{plural(summary.windowed, 'sequence')} {cut} were {windows}.")
    if files.variants:
        sentences.append(
            f"{plural(files.variants.scored, 'variant')} had wild-type and masked marginals (Meier et al., 2021), "
            "summed over the substitutions of each."
        )
    without = ", ".join(f"{reason.replace('_', ' ')}: {number:,}" for reason, number in counts.reasons.most_common())
    sentences.append(
        f"Of {plural(summary.records, 'record')} {summary.embedded:,} were embedded"
        + (f" and {summary.records - summary.embedded:,} were not ({without})." if without else ".")
    )
    if certificate and certificate.passed and certificate.outputs:
        cosine = min(output.cosine_min for output in certificate.outputs.values())
        sentences.append(
            f"Embeddings of {plural(certificate.verified_sequences(), 'sequence')} were computed again with "
            f"{certificate.verified_with}; the lowest cosine similarity was {cosine:.6f}."
        )
    return " ".join(sentences)


def _outputs(arrays: Iterable[Array]) -> str:
    """What each output is: such as `the mean over its residues of layers 11 and 12`."""
    layers: dict[str, list[str]] = {}
    for array in arrays:
        layers.setdefault(array.kind, []).append(str(array.layer))
    return in_words(
        f"{_KINDS[kind]} of {'layer' if len(of_kind) == 1 else 'layers'} {in_words(of_kind)}"
        if kind in _KINDS
        else _OTHERS[kind]
        for kind, of_kind in layers.items()
    )
