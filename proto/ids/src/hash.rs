//! The chained hash that names the content of a KV block.
//!
//! A block's hash covers every token from the start of the sequence to the block's end, the
//! deployment's key and the tenant's salt, so equal hashes mean equal KV and a hash tells nothing
//! to someone without the key. 128 bits of BLAKE3 in keyed mode.
//! It does not decide what may be shared: that is the prefix index.

use crate::{BLOCK_TOKENS, TokenId};

/// Content of a sequence up to a block boundary.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct BlockHash(pub u128);

/// The secret of a deployment; hashes made under different keys never meet.
#[derive(Clone)]
pub struct HashKey([u8; 32]);

impl HashKey {
    /// Derives the key from whatever identifies the deployment (model, revision, KV dtype) and a
    /// secret drawn at start.
    #[must_use]
    pub fn derive(deployment: &str, secret: &[u8]) -> Self {
        let mut hasher = blake3::Hasher::new_derive_key("tokenmill kv block hash v1, 64 tokens");
        hasher.update(&(deployment.len() as u64).to_le_bytes());
        hasher.update(deployment.as_bytes());
        hasher.update(secret);
        Self(*hasher.finalize().as_bytes())
    }

    /// The hash before the first block of every sequence under `salt` (tenant, adapter).
    #[must_use]
    pub fn root(&self, salt: &[u8]) -> BlockHash {
        let mut hasher = blake3::Hasher::new_keyed(&self.0);
        hasher.update(b"root");
        hasher.update(&(salt.len() as u64).to_le_bytes());
        hasher.update(salt);
        truncate(&hasher)
    }

    /// The hash of a full block that follows `parent`.
    ///
    /// # Panics
    /// When `tokens` is not exactly one block: a partial block has no name.
    #[must_use]
    pub fn chain(&self, parent: BlockHash, tokens: &[TokenId]) -> BlockHash {
        assert_eq!(tokens.len(), BLOCK_TOKENS as usize, "only a full block is hashed");
        let mut bytes = [0_u8; 16 + 4 * BLOCK_TOKENS as usize];
        bytes[..16].copy_from_slice(&parent.0.to_le_bytes());
        for (chunk, token) in bytes[16..].chunks_exact_mut(4).zip(tokens) {
            chunk.copy_from_slice(&token.0.to_le_bytes());
        }
        let mut hasher = blake3::Hasher::new_keyed(&self.0);
        hasher.update(&bytes);
        truncate(&hasher)
    }

    /// Hashes of every full block of `tokens`, in order.
    #[must_use]
    pub fn chain_all(&self, root: BlockHash, tokens: &[TokenId]) -> Vec<BlockHash> {
        let mut parent = root;
        tokens
            .chunks_exact(BLOCK_TOKENS as usize)
            .map(|block| {
                parent = self.chain(parent, block);
                parent
            })
            .collect()
    }
}

fn truncate(hasher: &blake3::Hasher) -> BlockHash {
    let mut out = [0_u8; 16];
    out.copy_from_slice(&hasher.finalize().as_bytes()[..16]);
    BlockHash(u128::from_le_bytes(out))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tokens(n: u32) -> Vec<TokenId> {
        (0..n).map(TokenId).collect()
    }

    #[test]
    fn a_hash_depends_on_key_salt_position_and_every_token() {
        let key = HashKey::derive("model", b"secret");
        let other = HashKey::derive("model", b"other");
        let root = key.root(b"");
        let base = key.chain(root, &tokens(64));
        assert_eq!(base, key.chain(root, &tokens(64)));
        assert_ne!(base, other.chain(other.root(b""), &tokens(64)));
        assert_ne!(base, key.chain(key.root(b"tenant"), &tokens(64)));
        assert_ne!(base, key.chain(base, &tokens(64)));
        for i in 0..64 {
            let mut changed = tokens(64);
            changed[i] = TokenId(999);
            assert_ne!(base, key.chain(root, &changed), "token {i} is not covered");
        }
    }

    #[test]
    fn only_full_blocks_are_chained() {
        let key = HashKey::derive("model", b"");
        let all = key.chain_all(key.root(b""), &tokens(200));
        assert_eq!(all.len(), 3);
        assert_eq!(all[1], key.chain(all[0], &tokens(128)[64..]));
    }
}
