//! Block hashes of a prompt, made where the prompt is, off the scheduler's thread.

use ids::{BlockHash, HashKey, TokenId};

/// Hashes of every full block of `prompt`, under `salt` (tenant, client's cache salt, adapter).
/// Requests with different salts share no hash.
#[must_use]
pub fn hash_prompt(key: &HashKey, salt: &[u8], prompt: &[TokenId]) -> Vec<BlockHash> {
    key.chain_all(key.root(salt), prompt)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_prefixes_share_hashes_and_salts_do_not() {
        let key = HashKey::derive("model", b"secret");
        let long: Vec<TokenId> = (0..200).map(TokenId).collect();
        let whole = hash_prompt(&key, b"", &long);
        assert_eq!(whole.len(), 3);
        assert_eq!(hash_prompt(&key, b"", &long[..130]), whole[..2]);
        assert!(hash_prompt(&key, b"a", &long).iter().all(|hash| !whole.contains(hash)));
    }
}
