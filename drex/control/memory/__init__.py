"""Who holds which K/V slots and arena rows."""
