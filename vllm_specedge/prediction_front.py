"""The public name of the middleware: `--middleware vllm_specedge.prediction_front.PredictionMiddleware`."""

from vllm_specedge.frontend.predicted_outputs import PredictionMiddleware

__all__ = ["PredictionMiddleware"]
