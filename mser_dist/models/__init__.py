"""Builds, loads and exports networks: encoder, Q-Former, text tower, LLM, the two stages' models; and their prompts.

Uses what an encoder is fed from `stream`; knows nothing of losses over ranks but `contrastive`, nothing of runs.
"""
