"""The public name of the admission middleware: `--middleware vllm_specedge.admission.AdmissionMiddleware`."""

from vllm_specedge.frontend.admission import AdmissionMiddleware

__all__ = ["AdmissionMiddleware"]
