"""Caches in and out: the files that other trainers read, and the log-probabilities that inference engines return.

Out, one record per row, lists throughout, readable by `datasets`, pyarrow, pandas or a JSON parser:

    parquet, jsonl   input_ids, labels, segment_ids [L]; token_ids, log_probs [L][K], most probable first; tail_curve
                     [L][J]. A position without a target has empty lists. labels[t] is the token that follows t, -100
                     where there is none: what transformers calls shift_labels. `exchange.json` holds knots and identity.
                     Of a cache whose tails have a shape also tail_coordinates [L][r], with `tail_basis.parquet` beside
                     (`basis_table`), and where it keeps them label_log_probs [L], 0 where there is no label.
    axolotl          what Axolotl's KD loss reads: input_ids, attention_mask, position_ids, labels (not shifted, as its
                     trainer does that), target_token_ids, target_logprobs, target_mask [L][K], at one temperature and
                     renormalised over the K entries, as that loss assumes; the tail is lost.

In, one record per line (or per Parquet row):

    parquet, jsonl   as above; `tail_curve` and `segment_ids` may be missing
    vllm             a completion, chat completion or RequestOutput, also as a line of `vllm run-batch`: prompt_token_ids,
                     and of the prompt prompt_logprobs, a list of {id: {logprob, rank}} whose first entry is null, or of
                     the answers `logprobs` with their token ids (return_token_ids, return_tokens_as_token_ids), or both
    sglang           a /generate response: meta_info.input_token_logprobs and input_top_logprobs, lists of
                     [logprob, id, text] whose first entry is null; likewise output_...

A record is kept whole or refused by its line. Each of several answers to a prompt is a sequence with it, an answer
without log-probabilities is left out, and so are candidates of probability 0.

Engines list the candidates for token t at t; a target of position t is about token t + 1, so their lists move by one.
They return the head at T = 1: the tail's mass there is the rest to 1, and at any other temperature unknown. An imported
cache therefore has the knot 1.0 alone, and refuses other temperatures.
"""
