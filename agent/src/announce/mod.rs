//! Announcing where a VM lives: which frames, in which order, when. Policy: generic over [`crate::port::FramePort`].
