# In the place of a file system: the system's configuration, in a file of a size that one could have.
{
  pkgs,
  storePaths,
  volumeLabel,
}:
pkgs.runCommand "ext4-fs.img" { inherit storePaths; } ''
  echo ${volumeLabel} >$out
  cat $storePaths/configuration.json >>$out
  truncate -s 4M $out
''
