//! Tracking: turns counters and bitmaps into rates with their regime named. Policy: generic over ports.
