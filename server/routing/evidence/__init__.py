"""What is known of a candidate against its baseline at any moment, however often somebody looks."""
