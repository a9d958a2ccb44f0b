//! KV block ownership: pool, prefix index, limbo.
