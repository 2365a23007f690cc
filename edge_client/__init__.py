"""The edge's side of vLLM-SpecEdge: drafts tokens for a server that verifies them. Importing this loads no torch."""
