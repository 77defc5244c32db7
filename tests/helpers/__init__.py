"""What tests share. Each module says what it offers; scripts that ranks run are started as `-m helpers.NAME`."""
