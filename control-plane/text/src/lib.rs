//! Tokenizer, chat templates, incremental detokenising, stop strings.
